-------------------------------- MODULE Cow --------------------------------
(***************************************************************************)
(* Frames, layers, VMs, devices: who may be shown what, and when a page    *)
(* may be given back.                                                      *)
(*                                                                         *)
(* Grain: one step of an operation under a region's state lock is one      *)
(* step here. Between two steps of it devices transfer, lockless pins come *)
(* and go, guests of other VMs write, and the reclaim thread sweeps. That  *)
(* bit and count are one word is shown in Ownership.tla, that a section    *)
(* keeps a view in Grace.tla, the background freeze in Background.tla.     *)
(*                                                                         *)
(* A frame is a page of a file, <<"file", f, p>>, or an anonymous copy,    *)
(* <<"anon", n, 0>>, or the zero page. A page of a layer lies in its file  *)
(* at the offset of the guest page (packing is left out). Bytes are the    *)
(* number of the write that made them; 0 is zeros.                         *)
(*                                                                         *)
(* A punched page of a file reads as zeros at once, also for a device that *)
(* holds its frame: that is what a part of a huge page does. An anonymous  *)
(* frame lives as long as a mapping or a device has it.                    *)
(***************************************************************************)
EXTENDS Naturals, FiniteSets, TLC, Rules

CONSTANTS
    VMs,        \* 1 is born at the start; the others are there later
    Pages,
    Files,      \* numbers from 1
    Anons,      \* numbers from 1
    Images,
    Devices,
    NoFork,     \* pages of VM 1 that children do not inherit
    MaxWrites,  \* writes of guests and devices
    MaxOps,     \* operations other than writes and pins
    Ops         \* which operations there are

VARIABLES
    vm,         \* VMs
    file,       \* memory files
    anon,       \* bytes of the kernel's private copies
    img,        \* images, as views or as handles
    dev,        \* devices
    retired,    \* views that were replaced while a section read them
    merged,     \* a compaction: MergedLayer in compact.rs
    sweep,      \* the reclaim thread's sweep
    whose,      \* which VM made a write, and where it was before
    ops         \* operations so far

vars == <<vm, file, anon, img, dev, retired, merged, sweep, whose, ops>>

Zero == 0
Writes == 1..MaxWrites
None == [p \in Pages |-> 0]
Idle == [k |-> "idle"]
NoVm == [live |-> FALSE, map |-> None, pub |-> None, under |-> [p \in Pages |-> <<"none", 0>>],
         anon |-> None, ex |-> [p \in Pages |-> FALSE], birth |-> 0, born |-> {}, nofork |-> {},
         anc |-> {}, want |-> None, op |-> Idle]
NoFile == [flag |-> FALSE, data |-> None]
NoImg == [form |-> "none", map |-> None, want |-> None, nofork |-> {}, anc |-> {}]
NoDev == [st |-> "idle"]
NoMerged == [v |-> 0, of |-> None, f |-> 0, left |-> {}, taken |-> {}]
NoSweep == [pc |-> 0, whole |-> {}, seen |-> {}]

Min(S) == CHOOSE x \in S : \A y \in S : x <= y
Live == {v \in VMs : vm[v].live}
Has(o) == o \in Ops /\ ops < MaxOps
Count == ops' = ops + 1
IsIdle(v) == vm[v].op.k = "idle"

-----------------------------------------------------------------------------
(* What is behind a page.                                                  *)

IsBorn(v, p) == vm[v].under[p][1] = "born"

\* pagemap: present, and not a file's; or mapped shared over the birth file.
Own(v, p) == vm[v].anon[p] # 0 \/ IsBorn(v, p)

Shown(v, p) ==
    LET n == vm[v].anon[p]
        f == vm[v].under[p][2]
    IN CASE n # 0 -> <<"anon", n, 0>>
         [] n = 0 /\ f # 0 -> <<"file", f, p>>
         [] OTHER -> <<"zero", 0, 0>>

Bytes(frame) ==
    CASE frame[1] = "anon" -> anon[frame[2]]
      [] frame[1] = "file" -> file[frame[2]].data[frame[3]]
      [] OTHER -> Zero

Sees(v, p) == Bytes(Shown(v, p))
InMap(m, p) == IF m[p] = 0 THEN Zero ELSE file[m[p]].data[p]

Held == {d \in Devices : dev[d].st = "held"}
Holders(v, p) == {d \in Held : dev[d].v = v /\ dev[d].p = p}
\* The word's count. (That it is exact is Ownership's.)
Pinned(v, p) == \E d \in Holders(v, p) : ~dev[d].section
\* Srcu::ranges
Read(v, p) == \E d \in Holders(v, p) : dev[d].section
Sections(v) == {d \in Held : dev[d].v = v /\ dev[d].section}

\* registry.rs: every map through which somebody may yet read a layer.
Views == {vm[v].pub : v \in Live} \cup {r.map : r \in retired}
         \cup {img[i].map : i \in {j \in Images : img[j].form = "view"}}
         \cup IF merged.v = 0 THEN {} ELSE {merged.of}
\* State::born, and MergedLayer::seen.
Registered ==
    {<<m[p], p>> : m \in Views, p \in Pages}
    \cup UNION {{<<vm[v].birth, p>> : p \in vm[v].born} : v \in Live}
    \cup {<<merged.f, p>> : p \in merged.left \cup merged.taken}

Handled == {f \in Files : \E i \in Images : img[i].form = "handle" /\ \E p \in Pages : img[i].map[p] = f}

\* Somebody has an Arc of the layer, or the kernel a mapping of the file.
Used(f) ==
    \/ \E v \in Live : \/ vm[v].birth = f
                       \/ \E p \in Pages : vm[v].map[p] = f \/ vm[v].under[p][2] = f
                       \/ vm[v].op.k = "freeze" /\ vm[v].op.f = f
    \/ \E m \in Views : \E p \in Pages : m[p] = f
    \/ f \in Handled
    \/ merged.v # 0 /\ merged.f = f
HasFrame(frame) == \E d \in Devices : dev[d].st # "idle" /\ dev[d].frame = frame
DeviceHas(f) == \E p \in Pages : HasFrame(<<"file", f, p>>)

\* pool.rs: a file that was a layer's is never written again. A number here may be another file's once nobody can tell.
FreshFiles == {f \in Files : ~Used(f) /\ (Off("no_file_is_used_again") \/ ~DeviceHas(f))}
FreeAnons == {n \in Anons : ~HasFrame(<<"anon", n, 0>>) /\ \A v \in Live : \A p \in Pages : vm[v].anon[p] # n}

-----------------------------------------------------------------------------
(* Writes: of the guest, with the kernel's copy, and of devices.           *)

Wrote == Cardinality({n \in Writes : whose[n] # 0})
\* What a device may yet read of a page: what the guest has been shown since the pin.
Note(v, p, n) == [d \in Devices |-> IF d \in Holders(v, p) /\ dev[d].section
                                   THEN [dev[d] EXCEPT !.ok = @ \cup {n}] ELSE dev[d]]

\* While StopsWriters is held.
Quiesced(v) == vm[v].op.k \in {"freeze", "undone", "reset", "evict", "take"}

\* The kernel: in place what is mapped shared or copied already, else a copy. No bit is set.
GuestWrite(v, p) ==
    /\ "write" \in Ops /\ v \in Live /\ ~Quiesced(v) /\ Wrote < MaxWrites
    /\ LET n == Wrote + 1
           m == vm[v].anon[p]
       IN /\ IF m # 0
             THEN /\ anon' = [anon EXCEPT ![m] = n]
                  /\ UNCHANGED file
                  /\ vm' = [vm EXCEPT ![v].want[p] = n]
             ELSE IF IsBorn(v, p)
             THEN /\ file' = [file EXCEPT ![vm[v].under[p][2]].data[p] = n]
                  /\ UNCHANGED anon
                  /\ vm' = [vm EXCEPT ![v].want[p] = n]
             ELSE /\ FreeAnons # {}
                  /\ anon' = [anon EXCEPT ![Min(FreeAnons)] = n]
                  /\ vm' = [vm EXCEPT ![v].want[p] = n, ![v].anon[p] = Min(FreeAnons)]
                  /\ UNCHANGED file
          /\ dev' = Note(v, p, n)
          /\ whose' = [whose EXCEPT ![n] = v]
    /\ UNCHANGED <<img, retired, merged, sweep, ops>>

\* DMA heeds no protection and no mapping: it goes to the frame.
DeviceWrite(d) ==
    /\ d \in Held /\ dev[d].acc = "w" /\ Wrote < MaxWrites
    /\ LET n == Wrote + 1
           fr == dev[d].frame
           v == dev[d].v
           p == dev[d].p
       IN /\ anon' = IF fr[1] = "anon" THEN [anon EXCEPT ![fr[2]] = n] ELSE anon
          /\ file' = IF fr[1] = "file" THEN [file EXCEPT ![fr[2]].data[fr[3]] = n] ELSE file
          /\ vm' = [vm EXCEPT ![v].want[p] = n]
          /\ dev' = Note(v, p, n)
          /\ whose' = [whose EXCEPT ![n] = v]
    /\ UNCHANGED <<img, retired, merged, sweep, ops>>

-----------------------------------------------------------------------------
(* Pins.                                                                   *)

Hold(d, v, p, acc, section, frame) ==
    dev' = [dev EXCEPT ![d] = [st |-> "held", v |-> v, p |-> p, acc |-> acc, section |-> section, frame |-> frame,
                               ok |-> IF section THEN {vm[v].want[p]} ELSE {}]]

\* Word::try_pin: exclusive, and counted, in one step and without a lock.
PinFast(d, v, p, acc) ==
    /\ dev[d].st = "idle" /\ v \in Live /\ vm[v].ex[p]
    /\ Hold(d, v, p, acc, FALSE, Shown(v, p))
    /\ UNCHANGED <<vm, file, anon, img, retired, merged, sweep, whose, ops>>

\* GuestRegion::try_open: a short read of a page that is not the VM's own, while nothing changes. Nothing is counted.
PinSection(d, v, p) ==
    /\ dev[d].st = "idle" /\ v \in Live /\ ~vm[v].ex[p]
    /\ IsIdle(v) \/ Off("no_section_within_a_change")
    /\ Hold(d, v, p, "r", TRUE, Shown(v, p))
    /\ UNCHANGED <<vm, file, anon, img, retired, merged, sweep, whose, ops>>

\* GuestRegion::pin_locked: break COW, then set the bit, then count. I9: a long read does so too.
PinLocked(d, v, p, acc) ==
    /\ dev[d].st = "idle" /\ v \in Live /\ ~vm[v].ex[p] /\ IsIdle(v)
    /\ LET inPlace == Own(v, p) \/ Off("pin_unshares") \/ (acc = "r" /\ Off("a_long_read_unshares"))
           n == Min(FreeAnons)
       IN /\ IF inPlace
             THEN /\ vm' = [vm EXCEPT ![v].ex[p] = (acc = "w" \/ Own(v, p) \/ On("a_long_read_unshares"))]
                  /\ UNCHANGED anon
                  /\ Hold(d, v, p, acc, FALSE, Shown(v, p))
             ELSE /\ FreeAnons # {}
                  /\ anon' = [anon EXCEPT ![n] = Sees(v, p)]
                  /\ vm' = [vm EXCEPT ![v].anon[p] = n, ![v].ex[p] = TRUE]
                  /\ Hold(d, v, p, acc, FALSE, <<"anon", n, 0>>)
    /\ UNCHANGED <<file, img, retired, merged, sweep, whose, ops>>

Pin(d, v, p) ==
    \/ "pin" \in Ops /\ \E acc \in {"r", "w"} : PinFast(d, v, p, acc) \/ PinLocked(d, v, p, acc)
    \/ Ops \cap {"pin", "read"} # {} /\ PinSection(d, v, p)

\* DmaPin::drop. The last section that was open when a view was replaced lets it go (Srcu::close).
Unpin(d) ==
    /\ d \in Held
    /\ dev' = [dev EXCEPT ![d] = NoDev]
    /\ retired' = {r \in {[q EXCEPT !.waits = @ \ {d}] : q \in retired} : r.waits # {}}
    /\ UNCHANGED <<vm, file, anon, img, merged, sweep, whose, ops>>

\* A splice keeps a layer's frame after its pin has gone, and nobody knows of it but the kernel.
Splice(d) ==
    /\ "splice" \in Ops /\ d \in Held /\ dev[d].section /\ dev[d].frame[1] = "file"
    /\ dev' = [dev EXCEPT ![d] = [st |-> "spliced", frame |-> dev[d].frame, was |-> Bytes(dev[d].frame)]]
    /\ retired' = {r \in {[q EXCEPT !.waits = @ \ {d}] : q \in retired} : r.waits # {}}
    /\ UNCHANGED <<vm, file, anon, img, merged, sweep, whose, ops>>

SpliceEnds(d) ==
    /\ dev[d].st = "spliced"
    /\ dev' = [dev EXCEPT ![d] = NoDev]
    /\ UNCHANGED <<vm, file, anon, img, retired, merged, sweep, whose, ops>>

-----------------------------------------------------------------------------
(* Publishing.                                                             *)

\* Srcu::retire: a view that was replaced stays registered while a section that was open then reads it.
Retire(v, m) ==
    IF Sections(v) = {} \/ Off("a_section_keeps_what_it_reads") THEN {}
    ELSE {[map |-> m, waits |-> Sections(v)]}

\* Locked::drop: what changed is published, then what it replaced is retired, then the lock is let go.
Unlock(v) ==
    /\ v \in Live /\ ~IsIdle(v) /\ vm[v].op.pc = "unlock"
    /\ vm' = [vm EXCEPT ![v].pub = vm[v].map, ![v].op = Idle]
    /\ retired' = IF vm[v].pub = vm[v].map THEN retired ELSE retired \cup Retire(v, vm[v].pub)
    /\ merged' = IF merged.v = v /\ merged.left = {} THEN NoMerged ELSE merged
    /\ UNCHANGED <<file, anon, img, dev, sweep, whose, ops>>

\* State::retire_base_if_shared, for a VM that has no page of its birth file any more.
NoBase(r) == IF \E p \in Pages : r.under[p][1] = "born" THEN r ELSE [r EXCEPT !.birth = 0, !.born = {}]
Unflag(fs, before, after) ==
    IF before.birth # 0 /\ after.birth = 0 THEN [fs EXCEPT ![before.birth].flag = FALSE] ELSE fs

-----------------------------------------------------------------------------
(* Freeze, eager: freeze.rs. Pages stand for regions where one fails after *)
(* another: a commit may stop after any of them.                           *)

\* GuestRegion::plan: the bits go first, atomically against lockless pins; what is pinned keeps its bit.
FreezePlan(v, i) ==
    /\ Has("freeze") /\ v \in Live /\ IsIdle(v) /\ img[i].form = "none"
    /\ \E gaps \in IF "gap" \in Ops THEN SUBSET Pages ELSE {{}} :
        LET kept == IF On("children_do_not_inherit_no_fork_pages") THEN vm[v].nofork ELSE {}
            born == {p \in Pages \ kept : IsBorn(v, p) /\ vm[v].anon[p] = 0}
            owned == {p \in Pages \ kept : vm[v].anon[p] # 0
                                           /\ (vm[v].ex[p] \/ On("the_kernel_is_asked_who_owns"))}
            pins == {p \in born \cup owned : Pinned(v, p)}
            copied == owned \cup gaps \cup IF On("the_layer_gets_pinned_pages") THEN pins ELSE {}
        IN /\ gaps \cap (born \cup owned \cup kept) = {}
           /\ gaps # {} => owned # {}
           /\ vm' = [vm EXCEPT
                ![v].ex = [p \in Pages |-> @[p] /\ ~(p \in (born \cup owned) \ pins /\ On("a_freeze_takes_the_bit"))],
                ![v].op = [k |-> "freeze", pc |-> "prepare", i |-> i, f |-> 0, born |-> born, owned |-> owned,
                           gaps |-> gaps, copied |-> copied, had |-> vm[v].ex, want |-> None,
                           pins |-> IF On("a_freeze_spares_pinned_pages") THEN pins ELSE {}]]
    /\ Count
    /\ UNCHANGED <<file, anon, img, dev, retired, merged, sweep, whose>>

\* GuestRegion::prepare_freeze: everything that needs a copy is copied while every page still is where it was.
FreezePrepare(v) ==
    LET op == vm[v].op
        f == Min(FreshFiles)
        now == [p \in Pages |-> IF p \in op.copied THEN vm[v].want[p] ELSE Zero]
    IN /\ v \in Live /\ op.k = "freeze" /\ op.pc = "prepare"
       /\ IF op.copied = {}
          THEN /\ vm' = [vm EXCEPT ![v].op.pc = "commit"]
               /\ UNCHANGED file
          ELSE /\ FreshFiles # {}
               /\ file' = [file EXCEPT ![f] = [flag |-> FALSE,
                    data |-> [p \in Pages |-> IF p \in op.copied THEN Sees(v, p) ELSE Zero]]]
               /\ vm' = [vm EXCEPT ![v].op.pc = "commit", ![v].op.f = f, ![v].op.want = now]
       /\ UNCHANGED <<anon, img, dev, retired, merged, sweep, whose, ops>>

\* I13: whatever is still born or private is still this VM's own.
Undo(r, op) ==
    [r EXCEPT !.ex = [p \in Pages |-> @[p] \/ (On("a_refused_freeze_gives_back") /\ p \in op.owned \cup op.born
                                               /\ (r.anon[p] # 0 \/ r.under[p][1] = "born"))],
              !.op = [k |-> "undone", pc |-> "unlock", had |-> op.had]]

\* A copy or a promise of mappings is refused, in this region or in one after it.
FreezeFails(v) ==
    /\ "fail" \in Ops /\ v \in Live /\ vm[v].op.k = "freeze" /\ vm[v].op.pc \in {"prepare", "commit"}
    /\ vm' = [vm EXCEPT ![v] = Undo(@, @.op)]
    /\ UNCHANGED <<file, anon, img, dev, retired, merged, sweep, whose, ops>>

\* GuestRegion::commit_freeze, first half: born pages that are not pinned are remapped private over the birth file, which is
\* their layer from then on. A mapping may fail after some; contents have not changed.
FreezeCommit(v) ==
    LET op == vm[v].op
        run == op.born \ op.pins
    IN /\ v \in Live /\ op.k = "freeze" /\ op.pc = "commit"
       /\ \E done \in IF "fail" \in Ops THEN SUBSET run ELSE {run} :
            LET r == [vm[v] EXCEPT
                    !.under = [p \in Pages |-> IF p \in done /\ On("the_birth_file_is_not_written_as_a_layer")
                                               THEN <<"priv", vm[v].birth>> ELSE @[p]],
                    !.map = [p \in Pages |-> IF p \in done THEN vm[v].birth ELSE @[p]]]
            IN vm' = [vm EXCEPT ![v] = IF done = run THEN [r EXCEPT !.op.pc = "register"] ELSE Undo(r, op)]
       /\ UNCHANGED <<file, anon, img, dev, retired, merged, sweep, whose, ops>>

\* privatize_dont_fork, then State::register_born: no-fork pages leave the birth file unless they are pinned; what is the VM's
\* own of the file is registered, and from then on the file may be swept.
FreezeRegister(v) ==
    LET op == vm[v].op
        old == vm[v]
        gone == {p \in old.nofork : IsBorn(v, p) /\ old.anon[p] = 0 /\ ~Pinned(v, p)}
        out == IF Cardinality(gone) <= Cardinality(FreeAnons) THEN gone ELSE {}
        to == CHOOSE g \in [out -> FreeAnons] : \A p, q \in out : p # q => g[p] # g[q]
        r == [old EXCEPT !.anon = [p \in Pages |-> IF p \in out THEN to[p] ELSE @[p]],
                         !.under = [p \in Pages |-> IF p \in out THEN <<"priv", 0>> ELSE @[p]],
                         !.pub = old.map,
                         !.op.pc = "share"]
        still == {p \in Pages : r.under[p][1] = "born"}
        s == NoBase([r EXCEPT !.born = IF On("born_pages_are_registered") THEN still ELSE {}])
        holed == [f \in Files |-> IF f # old.birth THEN file[f]
                  ELSE [flag |-> FALSE, data |-> [p \in Pages |-> IF p \in out THEN Zero ELSE file[f].data[p]]]]
    IN /\ v \in Live /\ op.k = "freeze" /\ op.pc = "register"
       /\ vm' = [vm EXCEPT ![v] = IF old.birth = 0 THEN [old EXCEPT !.op.pc = "share"] ELSE s]
       /\ file' = holed
       /\ anon' = [n \in Anons |-> IF \E p \in out : to[p] = n
                                   THEN Sees(v, CHOOSE p \in out : to[p] = n) ELSE anon[n]]
       /\ retired' = IF old.birth = 0 \/ old.pub = old.map THEN retired ELSE retired \cup Retire(v, old.pub)
       /\ UNCHANGED <<img, dev, merged, sweep, whose, ops>>

\* share_copies, keep_gaps, and the image: some copied pages are remapped over the delta, the others stay the VM's own.
FreezeShare(v) ==
    LET op == vm[v].op
        old == vm[v]
        full == [p \in Pages |-> IF p \in op.copied THEN op.f ELSE old.map[p]]
    IN /\ v \in Live /\ op.k = "freeze" /\ op.pc = "share"
       /\ \E back \in SUBSET (op.owned \ op.pins) :
            /\ vm' = [vm EXCEPT
                ![v].map = [p \in Pages |-> IF p \in op.gaps /\ On("a_gap_is_shown_from_beneath") THEN old.map[p] ELSE full[p]],
                ![v].under = [p \in Pages |-> IF p \in back THEN <<"priv", op.f>> ELSE old.under[p]],
                ![v].anon = [p \in Pages |-> IF p \in back THEN 0 ELSE old.anon[p]],
                ![v].ex = [p \in Pages |-> old.ex[p] \/ p \in op.owned \ back],
                ![v].op = [k |-> "freeze", pc |-> "unlock", f |-> op.f]]
       /\ LET hidden == IF On("children_do_not_inherit_no_fork_pages") THEN old.nofork ELSE {}
          IN img' = IF "noimage" \in Ops THEN img ELSE [img EXCEPT ![op.i] =
              [form |-> "view", nofork |-> old.nofork, anc |-> old.anc,
               map |-> [p \in Pages |-> IF p \in hidden THEN 0 ELSE full[p]],
               want |-> [p \in Pages |-> IF p \in old.nofork THEN Zero
                                         ELSE IF p \in op.copied THEN op.want[p] ELSE old.want[p]]]]
       /\ UNCHANGED <<file, anon, dev, retired, merged, sweep, whose, ops>>

-----------------------------------------------------------------------------
(* A VM comes and goes.                                                    *)

\* GuestRegion::birth
Birth(v) ==
    /\ Has("birth") /\ v \notin Live /\ FreshFiles # {}
    /\ LET f == Min(FreshFiles)
       IN /\ file' = [file EXCEPT ![f] = [flag |-> TRUE, data |-> IF On("a_birth_file_is_fresh") THEN None ELSE @.data]]
          /\ vm' = [vm EXCEPT ![v] = [NoVm EXCEPT !.live = TRUE, !.birth = f, !.anc = {v},
                        !.under = [p \in Pages |-> <<"born", f>>], !.ex = [p \in Pages |-> TRUE]]]
    /\ Count
    /\ UNCHANGED <<anon, img, dev, retired, merged, sweep, whose>>

\* GuestRegion::adopt: each entry is one private mapping; some runs are copied for want of mappings, and are the child's own.
Adopt(v, i) ==
    /\ Has("adopt") /\ v \notin Live /\ img[i].form = "view"
    /\ \E copies \in IF "adoptcopy" \in Ops THEN {c \in SUBSET Pages : \A p \in c : img[i].map[p] # 0} ELSE {{}} :
        /\ Cardinality(copies) <= Cardinality(FreeAnons)
        /\ LET to == CHOOSE g \in [copies -> FreeAnons] : \A p, q \in copies : p # q => g[p] # g[q]
           IN /\ vm' = [vm EXCEPT ![v] = [NoVm EXCEPT !.live = TRUE, !.anc = img[i].anc \cup {v},
                    !.map = img[i].map, !.pub = img[i].map, !.want = img[i].want, !.nofork = img[i].nofork,
                    !.under = [p \in Pages |-> <<"priv", IF p \in copies THEN 0 ELSE img[i].map[p]>>],
                    !.anon = [p \in Pages |-> IF p \in copies THEN to[p] ELSE 0],
                    !.ex = [p \in Pages |-> p \in copies]]]
              /\ anon' = [n \in Anons |-> IF \E p \in copies : to[p] = n
                            THEN InMap(img[i].map, CHOOSE p \in copies : to[p] = n) ELSE anon[n]]
    /\ Count
    /\ UNCHANGED <<file, img, dev, retired, merged, sweep, whose>>

\* GuestRegion::drop. A pin has the region, so a VM goes with its last pin.
Death(v) ==
    /\ Has("death") /\ v \in Live /\ IsIdle(v)
    /\ On("a_pin_keeps_its_region") => \A d \in Held : dev[d].v # v
    /\ vm' = [vm EXCEPT ![v] = NoVm]
    /\ file' = Unflag(file, vm[v], NoVm)
    /\ retired' = retired
    /\ merged' = IF merged.v = v THEN NoMerged ELSE merged
    /\ Count
    /\ UNCHANGED <<anon, img, dev, sweep, whose>>

\* The last clone of a RamImage goes.
DropImage(i) ==
    /\ Has("drop") /\ img[i].form # "none"
    /\ img' = [img EXCEPT ![i] = NoImg]
    /\ Count
    /\ UNCHANGED <<vm, file, anon, dev, retired, merged, sweep, whose>>

\* image_map: handles are made while the view is registered, then it goes. LayerHandle::new counts, which the sweep sees.
ToHandle(i) ==
    /\ Has("handle") /\ img[i].form = "view"
    /\ img' = [img EXCEPT ![i].form = "handle"]
    /\ sweep' = IF Off("handles_are_asked_before_the_views") THEN sweep
                ELSE [sweep EXCEPT !.whole = @ \ {img[i].map[p] : p \in Pages}]
    /\ Count
    /\ UNCHANGED <<vm, file, anon, dev, retired, merged, whose>>

\* layer_map: a view is made of handles and registered before they go.
FromHandle(i) ==
    /\ Has("handle") /\ img[i].form = "handle"
    /\ img' = [img EXCEPT ![i].form = "view"]
    /\ Count
    /\ UNCHANGED <<vm, file, anon, dev, retired, merged, sweep, whose>>

-----------------------------------------------------------------------------
(* What takes pages away.                                                  *)

\* GuestRegion::discard, share_unless_pinned: the bit goes first; what is pinned or being read stays.
DiscardTake(v, p) ==
    /\ Has("discard") /\ v \in Live /\ IsIdle(v)
    /\ On("a_discard_heeds_pins") => ~Pinned(v, p)
    /\ On("a_discard_heeds_reads") => ~Read(v, p)
    /\ vm' = [vm EXCEPT ![v].ex[p] = FALSE, ![v].op = [k |-> "discard", pc |-> "show", p |-> p]]
    /\ Count
    /\ UNCHANGED <<file, anon, img, dev, retired, merged, sweep, whose>>

\* GuestRegion::try_show with the page of zeros; free_born gives a birth file's page back.
DiscardShow(v) ==
    /\ v \in Live /\ vm[v].op.k = "discard" /\ vm[v].op.pc = "show"
    /\ LET p == vm[v].op.p
           old == vm[v]
           r == NoBase([old EXCEPT !.under[p] = <<"priv", 0>>, !.map[p] = 0, !.anon[p] = 0, !.want[p] = Zero,
                                   !.ex[p] = Off("reference_pages_are_never_exclusive"), !.op.pc = "unlock",
                                   !.born = @ \ {p}])
           fs == IF IsBorn(v, p) THEN [file EXCEPT ![old.birth].data[p] = Zero] ELSE file
       IN vm' = [vm EXCEPT ![v] = r] /\ file' = Unflag(fs, old, r)
    /\ UNCHANGED <<anon, img, dev, retired, merged, sweep, whose, ops>>

\* GuestRegion::give_back_unmapped: beyond its share of mappings a VM's own copy goes, and what is mapped beneath is shown. Only where
\* the map says the same; else the copy stays. A page of the birth file is a hole in place.
DiscardDrop(v) ==
    /\ "unmapped" \in Ops /\ v \in Live /\ vm[v].op.k = "discard" /\ vm[v].op.pc = "show"
    /\ LET p == vm[v].op.p
           old == vm[v]
           in_step == old.under[p] = <<"priv", old.map[p]>> \/ Off("a_drop_shows_what_the_map_says")
           beneath == IF old.under[p][2] = 0 THEN Zero ELSE file[old.under[p][2]].data[p]
       IN /\ vm' = [vm EXCEPT ![v] =
                IF IsBorn(v, p) THEN [old EXCEPT !.want[p] = Zero, !.ex[p] = TRUE, !.op.pc = "unlock"]
                ELSE IF in_step THEN [old EXCEPT !.anon[p] = 0, !.want[p] = beneath, !.op.pc = "unlock"]
                ELSE [old EXCEPT !.ex[p] = Own(v, p), !.op.pc = "unlock"]]
          /\ file' = IF IsBorn(v, p) THEN [file EXCEPT ![old.birth].data[p] = Zero] ELSE file
    /\ UNCHANGED <<anon, img, dev, retired, merged, sweep, whose, ops>>

\* GuestRegion::reset_all: nothing is read, the bits go, and a pin that got in first refuses it.
ResetTake(v, i) ==
    /\ Has("reset") /\ v \in Live /\ IsIdle(v) /\ img[i].form = "view" /\ img[i].anc \subseteq vm[v].anc \cup {v}
    /\ On("a_reset_heeds_reads") => Sections(v) = {}
    /\ On("a_reset_heeds_pins") => \A p \in Pages : ~Pinned(v, p)
    /\ vm' = [vm EXCEPT ![v].ex = [p \in Pages |-> FALSE], ![v].op = [k |-> "reset", pc |-> "put", i |-> i]]
    /\ Count
    /\ UNCHANGED <<file, anon, img, dev, retired, merged, sweep, whose>>

\* GuestRegion::put_back: what was written is dropped, or its bytes are restored in the VM's own copy; where another layer is behind it, it is
\* mapped anew.
ResetPut(v) ==
    /\ v \in Live /\ vm[v].op.k = "reset" /\ vm[v].op.pc = "put"
    /\ LET i == vm[v].op.i
           old == vm[v]
           anew == [p \in Pages |-> IF Off("a_reset_maps_anew_what_differs") /\ ~IsBorn(v, p) THEN old.under[p]
                                    ELSE <<"priv", img[i].map[p]>>]
           can == {p \in Pages : old.anon[p] # 0 /\ img[i].map[p] # 0 /\ old.under[p] = <<"priv", img[i].map[p]>>}
       IN \E kept \in SUBSET can :
          LET r == NoBase([old EXCEPT !.under = anew, !.map = img[i].map, !.want = img[i].want, !.op.pc = "unlock",
                                      !.anon = [p \in Pages |-> IF p \in kept THEN @[p] ELSE 0]])
          IN /\ vm' = [vm EXCEPT ![v] = r] /\ file' = Unflag(file, old, r)
             /\ anon' = [n \in Anons |-> IF On("a_reset_restores_the_bytes_of_what_it_keeps") /\ \E p \in kept : old.anon[p] = n
                           THEN InMap(img[i].map, CHOOSE p \in kept : old.anon[p] = n) ELSE anon[n]]
    /\ UNCHANGED <<img, dev, retired, merged, sweep, whose, ops>>

\* GuestRegion::evict: the bit goes; pinned, read and no-fork pages stay.
EvictTake(v, p) ==
    /\ Has("evict") /\ v \in Live /\ IsIdle(v) /\ Own(v, p) /\ p \notin vm[v].nofork
    /\ ~Read(v, p)
    /\ On("an_eviction_heeds_pins") => ~Pinned(v, p)
    /\ vm' = [vm EXCEPT ![v].ex[p] = FALSE, ![v].op = [k |-> "evict", pc |-> "write", p |-> p]]
    /\ Count
    /\ UNCHANGED <<file, anon, img, dev, retired, merged, sweep, whose>>

\* GuestRegion::write_away: a layer on a disk, mapped in the page's place.
EvictWrite(v) ==
    /\ v \in Live /\ vm[v].op.k = "evict" /\ vm[v].op.pc = "write" /\ FreshFiles # {}
    /\ LET p == vm[v].op.p
           f == Min(FreshFiles)
           old == vm[v]
           r == NoBase([old EXCEPT !.under[p] = <<"priv", f>>, !.map[p] = f, !.anon[p] = 0, !.op.pc = "unlock",
                                   !.born = @ \ {p}])
           fs == [file EXCEPT ![f] = [flag |-> FALSE, data |-> [None EXCEPT ![p] = Sees(v, p)]]]
           holed == IF IsBorn(v, p) THEN [fs EXCEPT ![old.birth].data[p] = Zero] ELSE fs
       IN vm' = [vm EXCEPT ![v] = r] /\ file' = Unflag(holed, old, r)
    /\ UNCHANGED <<anon, img, dev, retired, merged, sweep, whose, ops>>

\* MergedLayer::make, on the reclaim thread: the short pieces of a registered map, in one new layer. Its own view keeps it.
CompactMake(v) ==
    /\ Has("compact") /\ v \in Live /\ IsIdle(v) /\ merged.v = 0 /\ FreshFiles # {}
    /\ LET pages == {p \in Pages \ vm[v].nofork : vm[v].map[p] # 0}
           f == Min(FreshFiles)
       IN /\ pages # {}
          /\ file' = [file EXCEPT ![f] = [flag |-> FALSE,
                data |-> [p \in Pages |-> IF p \in pages THEN InMap(vm[v].map, p) ELSE Zero]]]
          /\ merged' = [v |-> v, of |-> vm[v].map, f |-> f, left |-> pages, taken |-> {}]
    /\ Count
    /\ UNCHANGED <<vm, anon, img, dev, retired, sweep, whose>>

\* GuestRegion::install_at_most: where the map still says what was copied. The VM's own pages stay; of them only the map changes.
TakeOver(v) ==
    /\ "compact" \in Ops /\ v \in Live /\ IsIdle(v) /\ merged.v = v /\ merged.left # {}
    /\ \E part \in SUBSET merged.left \ {{}} :
        LET same == {p \in part : (vm[v].map[p] = merged.of[p] \/ Off("a_take_over_asks_whether_the_map_changed"))
                                  /\ p \notin vm[v].nofork}
            left == merged.left \ part
        IN /\ vm' = [vm EXCEPT
                ![v].map = [p \in Pages |-> IF p \in same THEN merged.f ELSE @[p]],
                ![v].under = [p \in Pages |-> IF p \in same /\ ~Own(v, p) THEN <<"priv", merged.f>> ELSE @[p]],
                ![v].op = [k |-> "take", pc |-> "unlock"]]
           \* keep_until_published: with the last part its view would go, before what it shows is published.
           /\ merged' = IF left = {} /\ Off("a_view_goes_after_the_next_is_published") THEN NoMerged
                        ELSE [merged EXCEPT !.left = left, !.taken = @ \cup part]
    /\ UNCHANGED <<file, anon, img, dev, retired, sweep, whose, ops>>

-----------------------------------------------------------------------------
(* The sweep: sweep_in_steps.                                              *)

InSight == {f \in Files : \E p \in Pages : <<f, p>> \in Registered}

\* whole_layers, before the views are looked at.
SweepWhole ==
    /\ Has("sweep") /\ sweep.pc = 0
    /\ sweep' = [pc |-> 1, seen |-> {},
                 whole |-> {f \in InSight : ~file[f].flag \/ Off("a_birth_file_is_asked_before_the_views")}
                           \ IF On("a_sweep_heeds_handles") /\ On("handles_are_asked_before_the_views")
                             THEN Handled ELSE {}]
    /\ Count
    /\ UNCHANGED <<vm, file, anon, img, dev, retired, merged, whose>>

\* seen_in: the registry is copied in one step.
SweepLook ==
    /\ sweep.pc = 1
    /\ sweep' = [sweep EXCEPT !.pc = 2, !.seen = Registered]
    /\ UNCHANGED <<vm, file, anon, img, dev, retired, merged, whose, ops>>

\* dead_runs, and PUNCH_HOLE.
SweepPunch ==
    /\ sweep.pc = 2
    /\ LET left == {f \in sweep.whole : On("a_birth_file_is_asked_before_the_views") \/ ~file[f].flag}
           asked == IF Off("a_sweep_heeds_handles") THEN left ELSE left \ Handled
           swept == {f \in asked : \E p \in Pages : <<f, p>> \in sweep.seen}
       IN /\ file' = [f \in Files |-> IF f \notin swept THEN file[f]
                ELSE [file[f] EXCEPT !.data = [p \in Pages |-> IF <<f, p>> \in sweep.seen THEN @[p] ELSE Zero]]]
          \* The kernel keeps a frame that is spliced as it is; it is the file's no more.
          /\ dev' = [d \in Devices |-> IF dev[d].st = "spliced" /\ dev[d].frame[2] \in swept
                        /\ <<dev[d].frame[2], dev[d].frame[3]>> \notin sweep.seen THEN NoDev ELSE dev[d]]
    /\ sweep' = NoSweep
    /\ UNCHANGED <<vm, anon, img, retired, merged, whose, ops>>

-----------------------------------------------------------------------------
Init ==
    /\ vm = [v \in VMs |-> IF v # 1 THEN NoVm ELSE
              [NoVm EXCEPT !.live = TRUE, !.birth = 1, !.anc = {1}, !.nofork = NoFork,
                           !.under = [p \in Pages |-> <<"born", 1>>], !.ex = [p \in Pages |-> TRUE]]]
    /\ file = [f \in Files |-> IF f = 1 THEN [flag |-> TRUE, data |-> None] ELSE NoFile]
    /\ anon = [n \in Anons |-> Zero]
    /\ img = [i \in Images |-> NoImg]
    /\ dev = [d \in Devices |-> NoDev]
    /\ retired = {}
    /\ merged = NoMerged
    /\ sweep = NoSweep
    /\ whose = [n \in Writes |-> 0]
    /\ ops = 0

Next ==
    \/ \E v \in VMs :
        \/ \E p \in Pages : GuestWrite(v, p) \/ DiscardTake(v, p) \/ EvictTake(v, p)
                            \/ \E d \in Devices : Pin(d, v, p)
        \/ \E i \in Images : FreezePlan(v, i) \/ Adopt(v, i) \/ ResetTake(v, i)
        \/ FreezePrepare(v) \/ FreezeFails(v) \/ FreezeCommit(v) \/ FreezeRegister(v) \/ FreezeShare(v)
        \/ DiscardShow(v) \/ DiscardDrop(v) \/ ResetPut(v) \/ EvictWrite(v) \/ CompactMake(v) \/ TakeOver(v)
        \/ Unlock(v) \/ Birth(v) \/ Death(v)
    \/ \E d \in Devices : DeviceWrite(d) \/ Unpin(d) \/ Splice(d) \/ SpliceEnds(d)
    \/ \E i \in Images : DropImage(i) \/ ToHandle(i) \/ FromHandle(i)
    \/ SweepWhole \/ SweepLook \/ SweepPunch

Spec == Init /\ [][Next]_vars

\* What nobody has cannot be told apart. (Not where a rule is off that lets somebody look.)
Canonical ==
    <<vm, [f \in Files |-> IF Used(f) \/ DeviceHas(f) THEN file[f] ELSE NoFile],
      [n \in Anons |-> IF n \in FreeAnons THEN Zero ELSE anon[n]],
      img, dev, retired, merged, sweep, whose, ops>>

-----------------------------------------------------------------------------
(* The invariants, by their numbers in docs/design.md.                     *)

Shared(f, p) ==
    \/ \E i \in Images : img[i].form # "none" /\ img[i].map[p] = f
    \/ \E v \in Live : (vm[v].under[p] = <<"priv", f>> /\ vm[v].anon[p] = 0) \/ vm[v].pub[p] = f

\* What CPU or device can write in place is in nobody else's view.
I1 == \A v \in Live : \A p \in Pages :
        /\ IsBorn(v, p) /\ vm[v].anon[p] = 0 => ~Shared(vm[v].under[p][2], p)
        /\ \A d \in Holders(v, p) : dev[d].acc = "w" => vm[v].ex[p] /\ Own(v, p)

\* The bit says what the kernel confirms. Set by birth, break-COW and copying; cleared by what gives the page away.
I2 == \A v \in Live : \A p \in Pages : vm[v].ex[p] => Own(v, p)

\* A pinned page is exclusive and the same frame from pin to unpin.
I3 == \A d \in Held : ~dev[d].section =>
        vm[dev[d].v].live /\ vm[dev[d].v].ex[dev[d].p] /\ Shown(dev[d].v, dev[d].p) = dev[d].frame

\* A layer's page does not change while a view or a handle names it.
Named == {<<f, p>> \in Files \X Pages : \/ <<f, p>> \in {<<m[q], q>> : m \in Views, q \in Pages}
                                        \/ \E i \in Images : img[i].form = "handle" /\ img[i].map[p] = f}
I4 == [][file' # file => \A s \in Named : s \in Named' => file'[s[1]].data[s[2]] = file[s[1]].data[s[2]]]_vars

\* I5, "unsure means copy", shows where it is broken: ChildSees. I6, I8 and I12 are Ownership's.

\* What is pinned or being read is not taken away: it shows the same bytes, but for writes.
I7 == [][\A d \in Held : dev'[d].st = "held" =>
            \/ whose' # whose
            \/ vm'[dev[d].v].live /\ Sees(dev[d].v, dev[d].p)' = Sees(dev[d].v, dev[d].p)]_vars

\* A long-term read pin sees the guest's later writes.
I9 == \A d \in Held : ~dev[d].section /\ dev[d].acc = "r" => Bytes(dev[d].frame) = vm[dev[d].v].want[dev[d].p]

\* The page of zeros is nobody's own.
I10 == \A v \in Live : \A p \in Pages : vm[v].ex[p] => Shown(v, p) # <<"zero", 0, 0>>

\* No byte written to a no-fork page is another VM's or an image's.
I11 == /\ \A i \in Images : img[i].form # "none" => \A p \in img[i].nofork : img[i].map[p] = 0
       /\ \A v \in Live : \A p \in vm[v].nofork : Sees(v, p) = Zero \/ whose[Sees(v, p)] = v

\* A refused freeze: every page is the VM's own that was.
I13 == \A v \in Live : vm[v].op.k = "undone" => \A p \in Pages : vm[v].op.had[p] /\ Own(v, p) => vm[v].ex[p]

\* A page that is not the VM's own is shown from where the map says, and the published view says so too.
I14 == \A v \in Live : \A p \in Pages : ~Own(v, p) =>
        /\ vm[v].under[p] = <<"priv", vm[v].map[p]>>
        /\ IsIdle(v) => vm[v].pub[p] = vm[v].map[p]

(* End to end.                                                             *)

\* A guest sees what it and its devices wrote last.
GuestSees == \A v \in Live : \A p \in Pages : Sees(v, p) = vm[v].want[p]

\* A device reads what its guest has seen since the pin.
DeviceSees == \A d \in Devices :
    IF dev[d].st = "idle" THEN TRUE
    ELSE IF dev[d].st = "spliced" THEN Bytes(dev[d].frame) = dev[d].was
    ELSE IF dev[d].section THEN Bytes(dev[d].frame) \in dev[d].ok ELSE Bytes(dev[d].frame) = vm[dev[d].v].want[dev[d].p]

\* A child sees its parent's bytes of the fork's instant.
ChildSees == \A i \in Images : img[i].form # "none" => \A p \in Pages : InMap(img[i].map, p) = img[i].want[p]

\* Nobody sees a byte of a stranger.
From(n, anc) == n = Zero \/ whose[n] \in anc
NoStranger ==
    /\ \A v \in Live : \A p \in Pages : From(Sees(v, p), vm[v].anc)
    /\ \A i \in Images : img[i].form # "none" => \A p \in Pages : From(InMap(img[i].map, p), img[i].anc)
    /\ \A d \in Held : vm[dev[d].v].live => From(Bytes(dev[d].frame), vm[dev[d].v].anc)
=============================================================================
