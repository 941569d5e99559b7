------------------------------- MODULE Detach -------------------------------
(***************************************************************************)
(* Checkpoints, and processes that write what they gave.                   *)
(*                                                                         *)
(* A process that has a file open for writing may write any page of it at  *)
(* any time: a guest has broken into it. That is so for the process of     *)
(* each VM, and for the worker that copies the files of a checkpoint. In   *)
(* Cow.tla each process heeds the protocol; here none does.                *)
(*                                                                         *)
(* Grain: a file has an owner, the process that has it open for writing.   *)
(* A copier copies one page at a time. Bytes are the number of the write   *)
(* that made them; 0 is zeros.                                             *)
(***************************************************************************)
EXTENDS Naturals, FiniteSets, Rules

CONSTANTS
    VMs,
    Pages,
    Files,          \* inode numbers: used again once no process and no checkpoint has the file
    Checkpoints,
    MaxWrites

VARIABLES
    vm,         \* for each VM the file of each page, and the file of its own pages
    file,       \* owner and bytes
    check,      \* checkpoints
    writes

vars == <<vm, file, check, writes>>

None == [p \in Pages |-> 0]
Nobody == 0
\* The number of no VM.
Copier == 9
NoVm == [live |-> FALSE, map |-> None, own |-> 0, from |-> 0, want |-> None, wrote |-> {}]
NoFile == [owner |-> Nobody, data |-> None]
NoCheck == [st |-> "none", map |-> None, copy |-> 0, left |-> {}, known |-> {}, want |-> None]

Min(S) == CHOOSE x \in S : \A y \in S : x <= y
Live == {v \in VMs : vm[v].live}
Held == {c \in Checkpoints : check[c].st = "held"}

Names(map, f) == \E p \in Pages : map[p] = f
Used(f) ==
    \/ \E v \in Live : vm[v].own = f \/ Names(vm[v].map, f)
    \/ \E c \in Checkpoints : check[c].st # "none" /\ (check[c].copy = f \/ Names(check[c].map, f))
Fresh == {f \in Files : ~Used(f)}

\* CopiedFiles::among: files that no process can write, by their numbers.
Known == UNION {check[c].known : c \in Checkpoints}

Seen(map) == [p \in Pages |-> IF map[p] = 0 THEN 0 ELSE file[map[p]].data[p]]

-----------------------------------------------------------------------------
Boot(v) ==
    /\ ~vm[v].live /\ Fresh # {}
    /\ LET f == Min(Fresh)
       IN /\ vm' = [vm EXCEPT ![v] = [NoVm EXCEPT !.live = TRUE, !.map = [p \in Pages |-> f], !.own = f]]
          /\ file' = [file EXCEPT ![f] = [owner |-> v, data |-> None]]
    /\ UNCHANGED <<check, writes>>

\* A child's own pages are in a file of its own. All others are those of the checkpoint.
Fork(c, v) ==
    /\ c \in Held /\ ~vm[v].live /\ Fresh # {}
    /\ LET f == Min(Fresh)
       IN /\ vm' = [vm EXCEPT ![v] = [NoVm EXCEPT !.live = TRUE, !.map = check[c].map, !.own = f, !.from = c,
                                          !.want = check[c].want]]
          /\ file' = [file EXCEPT ![f] = [owner |-> v, data |-> None]]
    /\ UNCHANGED <<check, writes>>

\* The kernel's copy at a guest's write.
GuestWrite(v, p) ==
    /\ v \in Live /\ writes < MaxWrites
    /\ vm' = [vm EXCEPT ![v].map[p] = vm[v].own, ![v].wrote = @ \cup {p}]
    /\ file' = [file EXCEPT ![vm[v].own].data[p] = writes + 1]
    /\ writes' = writes + 1
    /\ UNCHANGED check

\* A process that was broken into: its own file, at any time, whoever shows it.
BrokenWrite(f, p) ==
    /\ file[f].owner # Nobody /\ Used(f) /\ writes < MaxWrites
    /\ file' = [file EXCEPT ![f].data[p] = writes + 1]
    /\ writes' = writes + 1
    /\ UNCHANGED <<vm, check>>

\* Its memory goes on in a file of its own, as after a freeze. The old one stays open for writing.
Take(c, v) ==
    /\ v \in Live /\ check[c].st = "none" /\ Fresh # {}
    /\ LET unsafe == {p \in Pages : vm[v].map[p] # 0 /\ (vm[v].map[p] \notin Known)}
           left == IF On("what_a_vm_can_write_is_copied") THEN unsafe ELSE {}
           f == Min(Fresh)
       IN IF left = {}
          THEN /\ check' = [check EXCEPT ![c] = [NoCheck EXCEPT !.st = "copied", !.map = vm[v].map]]
               /\ UNCHANGED file
          ELSE /\ check' = [check EXCEPT ![c] = [NoCheck EXCEPT !.st = "copying", !.map = vm[v].map, !.copy = f,
                                                               !.left = left]]
               /\ file' = [file EXCEPT ![f] = [owner |-> Copier, data |-> None]]
    /\ UNCHANGED <<vm, writes>>

Copy(c, p) ==
    /\ check[c].st = "copying" /\ p \in check[c].left
    /\ file' = [file EXCEPT ![check[c].copy].data[p] = file[check[c].map[p]].data[p]]
    /\ check' = [check EXCEPT ![c].map[p] = check[c].copy, ![c].left = @ \ {p},
                              ![c].st = IF check[c].left = {p} THEN "copied" ELSE "copying"]
    /\ UNCHANGED <<vm, writes>>

\* Worker::detach: the copier's descriptors go with its process. Then there is a checkpoint.
Hold(c) ==
    /\ check[c].st = "copied"
    /\ LET f == check[c].copy
       IN file' = IF f # 0 /\ On("the_copier_has_ended") THEN [file EXCEPT ![f].owner = Nobody] ELSE file
    /\ check' = [check EXCEPT ![c].st = "held", ![c].want = Seen(check[c].map),
                              ![c].known = {check[c].map[p] : p \in Pages} \ {0}]
    /\ UNCHANGED <<vm, writes>>

Drop(c) ==
    /\ c \in Held
    /\ check' = [check EXCEPT ![c] =
                    IF On("copies_are_known_while_they_are_held") THEN NoCheck ELSE [NoCheck EXCEPT !.known = check[c].known]]
    /\ UNCHANGED <<vm, file, writes>>

Death(v) ==
    /\ v \in Live
    /\ vm' = [vm EXCEPT ![v] = NoVm]
    /\ file' = [f \in Files |-> IF file[f].owner = v THEN [file[f] EXCEPT !.owner = Nobody] ELSE file[f]]
    /\ UNCHANGED <<check, writes>>

-----------------------------------------------------------------------------
Init ==
    /\ vm = [v \in VMs |-> NoVm]
    /\ file = [f \in Files |-> NoFile]
    /\ check = [c \in Checkpoints |-> NoCheck]
    /\ writes = 0

Next ==
    \/ \E v \in VMs : Boot(v) \/ Death(v) \/ \E p \in Pages : GuestWrite(v, p)
    \/ \E c \in Checkpoints : Hold(c) \/ Drop(c) \/ \E v \in VMs : Fork(c, v) \/ Take(c, v)
    \/ \E c \in Checkpoints, p \in Pages : Copy(c, p)
    \/ \E f \in Files, p \in Pages : BrokenWrite(f, p)

Spec == Init /\ [][Next]_vars

\* Files that nothing has cannot be told apart.
Canonical == <<vm, [f \in Files |-> IF Used(f) THEN file[f] ELSE NoFile], check, writes>>

-----------------------------------------------------------------------------
\* I4, against every process: a checkpoint is as it was when it was held.
CheckpointStays == \A c \in Held : Seen(check[c].map) = check[c].want

\* A child sees the checkpoint's bytes where it has written nothing, whatever its own process writes.
ChildSees == \A v \in Live : vm[v].from # 0 =>
    \A p \in Pages \ vm[v].wrote : Seen(vm[v].map)[p] = vm[v].want[p]

\* No file of a held checkpoint is open for writing.
NoWriter == \A c \in Held : \A p \in Pages : check[c].map[p] # 0 => file[check[c].map[p]].owner = Nobody
=============================================================================
