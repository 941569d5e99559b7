------------------------------- MODULE Grace -------------------------------
(***************************************************************************)
(* A short read pin of shared pages as a read-side section, against        *)
(* changes of the region: srcu.rs, at the grain of its atomic steps.       *)
(*                                                                         *)
(* One region of one page. It shows file `shown`; each change shows the    *)
(* next. A view that is replaced is retired and its file freed when nobody *)
(* reads it. A change of the other kind takes the page away at once, as a  *)
(* reset does, if nobody is noted as reading it. Readers open sections     *)
(* without a lock, take the frame that is shown, and close.                *)
(***************************************************************************)
EXTENDS Naturals, Sequences, FiniteSets, TLC, Rules

CONSTANTS Readers, Rounds, Changes

None == 99

(* --algorithm Grace
variables
    sequence = 0,
    current = 0,
    active = [s \in {0, 1} |-> 0],
    slots = [r \in Readers |-> FALSE],
    waiting = 0,
    closing = {}, fresh = {},           \* Retired
    mutex = "",                         \* of Retired
    bit = TRUE, settled = TRUE,         \* the page's exclusive bit; as it was when the last change ended
    shown = 0,
    freed = {},
    mine = [r \in Readers |-> None];    \* the frame a device has

\* Srcu::advance, under the mutex. Each look at a count is a step.
procedure advance()
begin
Look:
    if active[1 - current] # 0 then goto Waiting; end if;
Empty:
    freed := freed \cup closing \cup (IF Off("what_is_retired_waits_for_both_sides") THEN fresh ELSE {});
    closing := {};
    if Off("what_is_retired_waits_for_both_sides") then fresh := {}; end if;
TurnRound:
    if fresh # {} then
        closing := fresh;
        fresh := {};
        current := 1 - current;
        goto Look;
    end if;
Waiting:
    waiting := IF closing \cup fresh = {} THEN 0 ELSE 1;
    mutex := "";
    return;
end procedure;

process reader \in Readers
variables side = 0, before = 0, ok = FALSE, rounds = 0, last = FALSE, wrong = FALSE;
begin
Idle:
    while rounds < Rounds do
        rounds := rounds + 1;
        \* Srcu::open. A side that is stale by the time it is counted is as good.
        side := current;
Count:
        active[side] := active[side] + 1;
Note:
        if On("a_range_is_noted_first") then slots[self] := TRUE; end if;
Before:
        before := sequence;
SharedPage:
        ok := before % 2 = 0 /\ ~bit;
Again:
        ok := ok /\ (sequence = before \/ Off("the_sequence_is_looked_at_again"));
        wrong := ok /\ settled;
        \* The host takes the frame when it likes.
Take:
        if ok then mine[self] := shown; end if;
NoteLate:
        if Off("a_range_is_noted_first") then slots[self] := ok; end if;
        \* Srcu::close, leave.
Close:
        mine[self] := None;
        slots[self] := FALSE;
        wrong := FALSE;
Leave:
        active[side] := active[side] - 1;
        last := active[side] = 0;
CareFor:
        if last /\ waiting = 1 then
Lock:       await mutex = "";
            mutex := "reader";
            call advance();
        end if;
    end while;
end process;

\* Under the region's state lock: one at a time.
process changer = "changer"
variables changes = 0, read = FALSE, kind = "", after = FALSE;
begin
Begin:
    while changes < Changes do
        changes := changes + 1;
        with k \in {"replace", "take"}, b \in BOOLEAN do kind := k; after := b; end with;
        read := \E r \in Readers : slots[r];
        \* begin_change
Odd:
        sequence := sequence + 1;
        \* A bit is given up before anybody shares the page.
GiveUp:
        bit := FALSE;
        \* Srcu::ranges, within the change: no other section opens.
Ranges:
        if On("ranges_are_looked_at_within_the_change") then read := \E r \in Readers : slots[r]; end if;
Change:
        if kind = "take" then
            if ~read then
                freed := freed \cup {shown};
                shown := shown + 1;
                bit := after;
            else
                bit := settled;
            end if;
            goto Even;
        else
            shown := shown + 1;
            bit := after;
        end if;
        \* Srcu::retire
Retire:
        await mutex = "";
        mutex := "changer";
        fresh := fresh \cup {shown - 1};
        if On("waiting_is_said_before_the_counts_are_looked_at") then waiting := 1; end if;
        if Off("a_replaced_view_is_retired") then
            freed := freed \cup {shown - 1};
        end if;
Advance:
        call advance();
        \* end_change
Even:
        sequence := sequence + 1;
        settled := bit;
    end while;
end process;
end algorithm; *)
\* BEGIN TRANSLATION - the hash of the PCal code: PCal-5e6b3378966ee0cc5a6ffa975952a871
VARIABLES sequence, current, active, slots, waiting, closing, fresh, mutex, 
          bit, settled, shown, freed, mine, pc, stack, side, before, ok, 
          rounds, last, wrong, changes, read, kind, after

vars == << sequence, current, active, slots, waiting, closing, fresh, mutex, 
           bit, settled, shown, freed, mine, pc, stack, side, before, ok, 
           rounds, last, wrong, changes, read, kind, after >>

ProcSet == (Readers) \cup {"changer"}

Init == (* Global variables *)
        /\ sequence = 0
        /\ current = 0
        /\ active = [s \in {0, 1} |-> 0]
        /\ slots = [r \in Readers |-> FALSE]
        /\ waiting = 0
        /\ closing = {}
        /\ fresh = {}
        /\ mutex = ""
        /\ bit = TRUE
        /\ settled = TRUE
        /\ shown = 0
        /\ freed = {}
        /\ mine = [r \in Readers |-> None]
        (* Process reader *)
        /\ side = [self \in Readers |-> 0]
        /\ before = [self \in Readers |-> 0]
        /\ ok = [self \in Readers |-> FALSE]
        /\ rounds = [self \in Readers |-> 0]
        /\ last = [self \in Readers |-> FALSE]
        /\ wrong = [self \in Readers |-> FALSE]
        (* Process changer *)
        /\ changes = 0
        /\ read = FALSE
        /\ kind = ""
        /\ after = FALSE
        /\ stack = [self \in ProcSet |-> << >>]
        /\ pc = [self \in ProcSet |-> CASE self \in Readers -> "Idle"
                                        [] self = "changer" -> "Begin"]

Look(self) == /\ pc[self] = "Look"
              /\ IF active[1 - current] # 0
                    THEN /\ pc' = [pc EXCEPT ![self] = "Waiting"]
                    ELSE /\ pc' = [pc EXCEPT ![self] = "Empty"]
              /\ UNCHANGED << sequence, current, active, slots, waiting, 
                              closing, fresh, mutex, bit, settled, shown, 
                              freed, mine, stack, side, before, ok, rounds, 
                              last, wrong, changes, read, kind, after >>

Empty(self) == /\ pc[self] = "Empty"
               /\ freed' = (freed \cup closing \cup (IF Off("what_is_retired_waits_for_both_sides") THEN fresh ELSE {}))
               /\ closing' = {}
               /\ IF Off("what_is_retired_waits_for_both_sides")
                     THEN /\ fresh' = {}
                     ELSE /\ TRUE
                          /\ fresh' = fresh
               /\ pc' = [pc EXCEPT ![self] = "TurnRound"]
               /\ UNCHANGED << sequence, current, active, slots, waiting, 
                               mutex, bit, settled, shown, mine, stack, side, 
                               before, ok, rounds, last, wrong, changes, read, 
                               kind, after >>

TurnRound(self) == /\ pc[self] = "TurnRound"
                   /\ IF fresh # {}
                         THEN /\ closing' = fresh
                              /\ fresh' = {}
                              /\ current' = 1 - current
                              /\ pc' = [pc EXCEPT ![self] = "Look"]
                         ELSE /\ pc' = [pc EXCEPT ![self] = "Waiting"]
                              /\ UNCHANGED << current, closing, fresh >>
                   /\ UNCHANGED << sequence, active, slots, waiting, mutex, 
                                   bit, settled, shown, freed, mine, stack, 
                                   side, before, ok, rounds, last, wrong, 
                                   changes, read, kind, after >>

Waiting(self) == /\ pc[self] = "Waiting"
                 /\ waiting' = (IF closing \cup fresh = {} THEN 0 ELSE 1)
                 /\ mutex' = ""
                 /\ pc' = [pc EXCEPT ![self] = Head(stack[self]).pc]
                 /\ stack' = [stack EXCEPT ![self] = Tail(stack[self])]
                 /\ UNCHANGED << sequence, current, active, slots, closing, 
                                 fresh, bit, settled, shown, freed, mine, side, 
                                 before, ok, rounds, last, wrong, changes, 
                                 read, kind, after >>

advance(self) == Look(self) \/ Empty(self) \/ TurnRound(self)
                    \/ Waiting(self)

Idle(self) == /\ pc[self] = "Idle"
              /\ IF rounds[self] < Rounds
                    THEN /\ rounds' = [rounds EXCEPT ![self] = rounds[self] + 1]
                         /\ side' = [side EXCEPT ![self] = current]
                         /\ pc' = [pc EXCEPT ![self] = "Count"]
                    ELSE /\ pc' = [pc EXCEPT ![self] = "Done"]
                         /\ UNCHANGED << side, rounds >>
              /\ UNCHANGED << sequence, current, active, slots, waiting, 
                              closing, fresh, mutex, bit, settled, shown, 
                              freed, mine, stack, before, ok, last, wrong, 
                              changes, read, kind, after >>

Count(self) == /\ pc[self] = "Count"
               /\ active' = [active EXCEPT ![side[self]] = active[side[self]] + 1]
               /\ pc' = [pc EXCEPT ![self] = "Note"]
               /\ UNCHANGED << sequence, current, slots, waiting, closing, 
                               fresh, mutex, bit, settled, shown, freed, mine, 
                               stack, side, before, ok, rounds, last, wrong, 
                               changes, read, kind, after >>

Note(self) == /\ pc[self] = "Note"
              /\ IF On("a_range_is_noted_first")
                    THEN /\ slots' = [slots EXCEPT ![self] = TRUE]
                    ELSE /\ TRUE
                         /\ slots' = slots
              /\ pc' = [pc EXCEPT ![self] = "Before"]
              /\ UNCHANGED << sequence, current, active, waiting, closing, 
                              fresh, mutex, bit, settled, shown, freed, mine, 
                              stack, side, before, ok, rounds, last, wrong, 
                              changes, read, kind, after >>

Before(self) == /\ pc[self] = "Before"
                /\ before' = [before EXCEPT ![self] = sequence]
                /\ pc' = [pc EXCEPT ![self] = "SharedPage"]
                /\ UNCHANGED << sequence, current, active, slots, waiting, 
                                closing, fresh, mutex, bit, settled, shown, 
                                freed, mine, stack, side, ok, rounds, last, 
                                wrong, changes, read, kind, after >>

SharedPage(self) == /\ pc[self] = "SharedPage"
                    /\ ok' = [ok EXCEPT ![self] = before[self] % 2 = 0 /\ ~bit]
                    /\ pc' = [pc EXCEPT ![self] = "Again"]
                    /\ UNCHANGED << sequence, current, active, slots, waiting, 
                                    closing, fresh, mutex, bit, settled, shown, 
                                    freed, mine, stack, side, before, rounds, 
                                    last, wrong, changes, read, kind, after >>

Again(self) == /\ pc[self] = "Again"
               /\ ok' = [ok EXCEPT ![self] = ok[self] /\ (sequence = before[self] \/ Off("the_sequence_is_looked_at_again"))]
               /\ wrong' = [wrong EXCEPT ![self] = ok'[self] /\ settled]
               /\ pc' = [pc EXCEPT ![self] = "Take"]
               /\ UNCHANGED << sequence, current, active, slots, waiting, 
                               closing, fresh, mutex, bit, settled, shown, 
                               freed, mine, stack, side, before, rounds, last, 
                               changes, read, kind, after >>

Take(self) == /\ pc[self] = "Take"
              /\ IF ok[self]
                    THEN /\ mine' = [mine EXCEPT ![self] = shown]
                    ELSE /\ TRUE
                         /\ mine' = mine
              /\ pc' = [pc EXCEPT ![self] = "NoteLate"]
              /\ UNCHANGED << sequence, current, active, slots, waiting, 
                              closing, fresh, mutex, bit, settled, shown, 
                              freed, stack, side, before, ok, rounds, last, 
                              wrong, changes, read, kind, after >>

NoteLate(self) == /\ pc[self] = "NoteLate"
                  /\ IF Off("a_range_is_noted_first")
                        THEN /\ slots' = [slots EXCEPT ![self] = ok[self]]
                        ELSE /\ TRUE
                             /\ slots' = slots
                  /\ pc' = [pc EXCEPT ![self] = "Close"]
                  /\ UNCHANGED << sequence, current, active, waiting, closing, 
                                  fresh, mutex, bit, settled, shown, freed, 
                                  mine, stack, side, before, ok, rounds, last, 
                                  wrong, changes, read, kind, after >>

Close(self) == /\ pc[self] = "Close"
               /\ mine' = [mine EXCEPT ![self] = None]
               /\ slots' = [slots EXCEPT ![self] = FALSE]
               /\ wrong' = [wrong EXCEPT ![self] = FALSE]
               /\ pc' = [pc EXCEPT ![self] = "Leave"]
               /\ UNCHANGED << sequence, current, active, waiting, closing, 
                               fresh, mutex, bit, settled, shown, freed, stack, 
                               side, before, ok, rounds, last, changes, read, 
                               kind, after >>

Leave(self) == /\ pc[self] = "Leave"
               /\ active' = [active EXCEPT ![side[self]] = active[side[self]] - 1]
               /\ last' = [last EXCEPT ![self] = active'[side[self]] = 0]
               /\ pc' = [pc EXCEPT ![self] = "CareFor"]
               /\ UNCHANGED << sequence, current, slots, waiting, closing, 
                               fresh, mutex, bit, settled, shown, freed, mine, 
                               stack, side, before, ok, rounds, wrong, changes, 
                               read, kind, after >>

CareFor(self) == /\ pc[self] = "CareFor"
                 /\ IF last[self] /\ waiting = 1
                       THEN /\ pc' = [pc EXCEPT ![self] = "Lock"]
                       ELSE /\ pc' = [pc EXCEPT ![self] = "Idle"]
                 /\ UNCHANGED << sequence, current, active, slots, waiting, 
                                 closing, fresh, mutex, bit, settled, shown, 
                                 freed, mine, stack, side, before, ok, rounds, 
                                 last, wrong, changes, read, kind, after >>

Lock(self) == /\ pc[self] = "Lock"
              /\ mutex = ""
              /\ mutex' = "reader"
              /\ stack' = [stack EXCEPT ![self] = << [ procedure |->  "advance",
                                                       pc        |->  "Idle" ] >>
                                                   \o stack[self]]
              /\ pc' = [pc EXCEPT ![self] = "Look"]
              /\ UNCHANGED << sequence, current, active, slots, waiting, 
                              closing, fresh, bit, settled, shown, freed, mine, 
                              side, before, ok, rounds, last, wrong, changes, 
                              read, kind, after >>

reader(self) == Idle(self) \/ Count(self) \/ Note(self) \/ Before(self)
                   \/ SharedPage(self) \/ Again(self) \/ Take(self)
                   \/ NoteLate(self) \/ Close(self) \/ Leave(self)
                   \/ CareFor(self) \/ Lock(self)

Begin == /\ pc["changer"] = "Begin"
         /\ IF changes < Changes
               THEN /\ changes' = changes + 1
                    /\ \E k \in {"replace", "take"}:
                         \E b \in BOOLEAN:
                           /\ kind' = k
                           /\ after' = b
                    /\ read' = (\E r \in Readers : slots[r])
                    /\ pc' = [pc EXCEPT !["changer"] = "Odd"]
               ELSE /\ pc' = [pc EXCEPT !["changer"] = "Done"]
                    /\ UNCHANGED << changes, read, kind, after >>
         /\ UNCHANGED << sequence, current, active, slots, waiting, closing, 
                         fresh, mutex, bit, settled, shown, freed, mine, stack, 
                         side, before, ok, rounds, last, wrong >>

Odd == /\ pc["changer"] = "Odd"
       /\ sequence' = sequence + 1
       /\ pc' = [pc EXCEPT !["changer"] = "GiveUp"]
       /\ UNCHANGED << current, active, slots, waiting, closing, fresh, mutex, 
                       bit, settled, shown, freed, mine, stack, side, before, 
                       ok, rounds, last, wrong, changes, read, kind, after >>

GiveUp == /\ pc["changer"] = "GiveUp"
          /\ bit' = FALSE
          /\ pc' = [pc EXCEPT !["changer"] = "Ranges"]
          /\ UNCHANGED << sequence, current, active, slots, waiting, closing, 
                          fresh, mutex, settled, shown, freed, mine, stack, 
                          side, before, ok, rounds, last, wrong, changes, read, 
                          kind, after >>

Ranges == /\ pc["changer"] = "Ranges"
          /\ IF On("ranges_are_looked_at_within_the_change")
                THEN /\ read' = (\E r \in Readers : slots[r])
                ELSE /\ TRUE
                     /\ read' = read
          /\ pc' = [pc EXCEPT !["changer"] = "Change"]
          /\ UNCHANGED << sequence, current, active, slots, waiting, closing, 
                          fresh, mutex, bit, settled, shown, freed, mine, 
                          stack, side, before, ok, rounds, last, wrong, 
                          changes, kind, after >>

Change == /\ pc["changer"] = "Change"
          /\ IF kind = "take"
                THEN /\ IF ~read
                           THEN /\ freed' = (freed \cup {shown})
                                /\ shown' = shown + 1
                                /\ bit' = after
                           ELSE /\ bit' = settled
                                /\ UNCHANGED << shown, freed >>
                     /\ pc' = [pc EXCEPT !["changer"] = "Even"]
                ELSE /\ shown' = shown + 1
                     /\ bit' = after
                     /\ pc' = [pc EXCEPT !["changer"] = "Retire"]
                     /\ freed' = freed
          /\ UNCHANGED << sequence, current, active, slots, waiting, closing, 
                          fresh, mutex, settled, mine, stack, side, before, ok, 
                          rounds, last, wrong, changes, read, kind, after >>

Retire == /\ pc["changer"] = "Retire"
          /\ mutex = ""
          /\ mutex' = "changer"
          /\ fresh' = (fresh \cup {shown - 1})
          /\ IF On("waiting_is_said_before_the_counts_are_looked_at")
                THEN /\ waiting' = 1
                ELSE /\ TRUE
                     /\ UNCHANGED waiting
          /\ IF Off("a_replaced_view_is_retired")
                THEN /\ freed' = (freed \cup {shown - 1})
                ELSE /\ TRUE
                     /\ freed' = freed
          /\ pc' = [pc EXCEPT !["changer"] = "Advance"]
          /\ UNCHANGED << sequence, current, active, slots, closing, bit, 
                          settled, shown, mine, stack, side, before, ok, 
                          rounds, last, wrong, changes, read, kind, after >>

Advance == /\ pc["changer"] = "Advance"
           /\ stack' = [stack EXCEPT !["changer"] = << [ procedure |->  "advance",
                                                         pc        |->  "Even" ] >>
                                                     \o stack["changer"]]
           /\ pc' = [pc EXCEPT !["changer"] = "Look"]
           /\ UNCHANGED << sequence, current, active, slots, waiting, closing, 
                           fresh, mutex, bit, settled, shown, freed, mine, 
                           side, before, ok, rounds, last, wrong, changes, 
                           read, kind, after >>

Even == /\ pc["changer"] = "Even"
        /\ sequence' = sequence + 1
        /\ settled' = bit
        /\ pc' = [pc EXCEPT !["changer"] = "Begin"]
        /\ UNCHANGED << current, active, slots, waiting, closing, fresh, mutex, 
                        bit, shown, freed, mine, stack, side, before, ok, 
                        rounds, last, wrong, changes, read, kind, after >>

changer == Begin \/ Odd \/ GiveUp \/ Ranges \/ Change \/ Retire \/ Advance
              \/ Even

(* Allow infinite stuttering to prevent deadlock on termination. *)
Terminating == /\ \A self \in ProcSet: pc[self] = "Done"
               /\ UNCHANGED vars

Next == changer
           \/ (\E self \in ProcSet: advance(self))
           \/ (\E self \in Readers: reader(self))
           \/ Terminating

Spec == Init /\ [][Next]_vars

Termination == <>(\A self \in ProcSet: pc[self] = "Done")

\* END TRANSLATION - the hash of the generated TLA code (remove to silence divergence warnings): TLA-9ff46b2af7bed48ea5faa23564e71cda

-----------------------------------------------------------------------------
\* No frame is freed under a device that reads it.
I7 == \A r \in Readers : mine[r] # None => mine[r] \notin freed

\* No section opens over a page that is the VM's own, because a change has its bit in hand.
I8 == \A r \in Readers : ~wrong[r]

\* When all sections have ended, nothing that was retired is kept.
NothingKept ==
    (pc["changer"] = "Done" /\ \A r \in Readers : pc[r] = "Done") => closing = {} /\ fresh = {}
=============================================================================
