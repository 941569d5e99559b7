----------------------------- MODULE Background -----------------------------
(***************************************************************************)
(* A freeze whose pages are copied after its VM has resumed: protect,      *)
(* serve a writer, serve a reader, copy, share back, release, finish, and  *)
(* fail at any step. With children that read what is not there yet, pins   *)
(* of pages that are protected, a sweep, and the parent's death.           *)
(*                                                                         *)
(* Grain: what a BackgroundCopy does under its lock is one step, except where the *)
(* parent, a child or a device may look in between. One VM, one freeze of  *)
(* it. A page is the VM's own copy, or a gap: copied into the delta with   *)
(* its neighbours, though it is shown from the layer beneath.              *)
(***************************************************************************)
EXTENDS Naturals, FiniteSets, TLC, Rules

CONSTANTS Pages, Kids, MaxWrites,
          Fails,    \* whether a step may fail
          Sweeps,   \* whether there is a sweep
          Dies,     \* whether the frozen VM may go
          Pins,     \* whether there is a device
          Takes     \* whether the guest discards pages

VARIABLES
    kind,       \* "own" or "gap"
    frame,      \* what the parent is shown: its copy number g, or a layer's page
    bytes,      \* of the parent's copies
    beneath,    \* of the layer beneath
    delta,      \* of the delta's file
    filled,     \* FILLED in work.rs
    prot,       \* PROTECTED in work.rs, and with userfaultfd
    ex,         \* exclusive bits
    phase,      \* of the freeze, then of the filling
    stage,      \* CopyStage in work.rs
    remapped,   \* CopyWork::remapped: pages mapped over the delta
    map, pub,   \* the parent's map, and as it is registered
    before,     \* Freezing::before is registered
    lock,       \* the parent's state lock: "", or what holds it
    cpu,        \* the parent's vCPU: 0, or the page it waits for
    faults,     \* pages of write faults that were read and not answered
    kid,        \* children
    image,      \* whether the image is there
    dev,        \* a device: the page it holds, and the frame
    want,       \* what the parent's guest must see
    frozen,     \* its bytes of the freeze's instant
    alive,      \* the parent
    wrote       \* writes so far

vars == <<kind, frame, bytes, beneath, delta, filled, prot, ex, phase, stage, remapped, map, pub, before, lock, cpu,
          faults, kid, image, dev, want, frozen, alive, wrote>>
work == <<delta, filled, prot, phase, stage, remapped>>
parent == <<kind, beneath, frame, bytes, ex, map, pub, before, lock, alive, want, frozen, wrote>>

Hole == 99
Own == {p \in Pages : kind[p] = "own"}
HasCopy(p) == frame[p].in = "copy"
Sees(p) == CASE frame[p].in = "copy" -> bytes[p]
             [] frame[p].in = "beneath" -> beneath[p]
             [] frame[p].in = "delta" -> delta[p]
             [] OTHER -> 0
Pinned(p) == dev.p = p
Freezing == phase \in {"plan", "pinned", "protect", "start"}
NoKid == [st |-> "none", p |-> 0, watched |-> FALSE, lost |-> {}]
NoDev == [p |-> 0, g |-> 0]
AllFilled(f) == \A p \in Pages : f[p]

Init ==
    /\ kind \in {k \in [Pages -> {"own", "gap"}] : \E p \in Pages : k[p] = "own"}
    /\ frame = [p \in Pages |-> [in |-> IF kind[p] = "own" THEN "copy" ELSE "beneath", g |-> 1]]
    /\ bytes = [p \in Pages |-> IF kind[p] = "own" THEN 20 + p ELSE 0]
    /\ beneath = [p \in Pages |-> 10 + p]
    /\ delta = [p \in Pages |-> Hole]
    /\ filled = [p \in Pages |-> FALSE]
    /\ prot = [p \in Pages |-> FALSE]
    \* (A copy that the kernel made has no bit yet. The freeze takes it all the same, and asks the kernel.)
    /\ ex = [p \in Pages |-> kind[p] = "own"]
    /\ phase = "plan" /\ stage = "copy" /\ remapped = {}
    /\ map = [p \in Pages |-> "beneath"] /\ pub = map
    /\ before = FALSE /\ lock = "freeze" /\ cpu = 0 /\ faults = {}
    /\ kid = [k \in Kids |-> NoKid]
    /\ image = FALSE
    /\ dev \in {NoDev} \cup {[p |-> p, g |-> 1] : p \in {q \in Pages : ex[q] /\ Pins}}
    /\ want = [p \in Pages |-> Sees(p)]
    /\ frozen = [p \in Pages |-> Sees(p)]
    /\ alive = TRUE /\ wrote = 0

-----------------------------------------------------------------------------
(* The freeze, with the VM paused. Devices go on.                          *)

\* plan: Shared::give_up takes the bits. What is pinned then keeps its bit, and is not looked at again.
Plan ==
    /\ phase = "plan" /\ phase' = "pinned"
    /\ On("a_freeze_waits_for_no_pin") \/ dev = NoDev
    /\ ex' = [p \in Pages |-> ex[p] /\ Pinned(p)]
    /\ UNCHANGED <<kind, frame, bytes, beneath, delta, filled, prot, stage, remapped, map, pub, before, lock, cpu,
                   faults, kid, image, dev, want, frozen, alive, wrote>>

\* BackgroundCopy::protect, first half: pinned pages are copied before anything is protected (fill_region).
FillPinned ==
    LET now == {p \in Own : ex[p] /\ On("pinned_pages_are_copied_first")}
    IN /\ phase = "pinned" /\ phase' = "protect"
       /\ delta' = [p \in Pages |-> IF p \in now THEN bytes[p] ELSE delta[p]]
       /\ filled' = [p \in Pages |-> p \in now]
       /\ frozen' = want
       /\ UNCHANGED <<kind, frame, bytes, beneath, prot, ex, stage, remapped, map, pub, before, lock, cpu, faults, kid,
                      image, dev, want, alive, wrote>>

\* Second half: the gate is asked for what gave up its bit, so never for a pinned page.
Protect ==
    /\ phase = "protect" /\ phase' = "start"
    /\ prot' = [p \in Pages |-> p \in Own /\ (~ex[p] \/ Off("a_pinned_page_is_not_protected"))]
    /\ frozen' = IF On("pinned_pages_are_copied_first") THEN frozen ELSE want
    /\ UNCHANGED <<kind, frame, bytes, beneath, delta, filled, ex, stage, remapped, map, pub, before, lock, cpu, faults,
                   kid, image, dev, want, alive, wrote>>

\* defer fails: nothing stays protected, the bits are set again, no image (I13).
Refuse ==
    /\ Fails /\ Freezing
    /\ phase' = "refused"
    /\ prot' = [p \in Pages |-> FALSE]
    /\ ex' = [p \in Pages |-> p \in Own]
    /\ lock' = ""
    /\ UNCHANGED <<kind, frame, bytes, beneath, delta, filled, stage, remapped, map, pub, before, cpu, faults, kid, image,
                   dev, want, frozen, alive, wrote>>

\* commit_freeze: the map says delta, the view before is kept, and the VM goes on.
Start ==
    /\ phase = "start" /\ phase' = "pending"
    /\ map' = [p \in Pages |-> "delta"] /\ pub' = map'
    /\ before' = TRUE /\ image' = TRUE /\ lock' = ""
    /\ UNCHANGED <<kind, frame, bytes, beneath, delta, filled, prot, ex, stage, remapped, cpu, faults, kid, dev, want,
                   frozen, alive, wrote>>

-----------------------------------------------------------------------------
(* What the filling does, under its lock.                                  *)

\* CopyWork::copy: UFFDIO_COPY puts one finished page into the file.
Filled(d, p) ==
    LET from == IF kind[p] = "own" THEN IF frame[p].in = "none" THEN 0 ELSE bytes[p] ELSE beneath[p]
    IN IF On("a_page_appears_whole_and_alone") THEN [d EXCEPT ![p] = from]
       ELSE [q \in Pages |-> IF q = p THEN from ELSE IF d[q] = Hole THEN 0 ELSE d[q]]

Kept(k) == On("a_failure_is_told_to_who_waits") \/ kid[k].st # "wait"
\* fail_locked: what is missing is denied to the children, who are told; nothing stays protected.
Lost ==
    /\ phase' = "failed"
    /\ prot' = [p \in Pages |-> FALSE]
    /\ cpu' = 0
    /\ kid' = [k \in Kids |-> IF kid[k].watched /\ Kept(k)
                              THEN [kid[k] EXCEPT !.lost = {p \in Pages : ~filled[p]}, !.watched = FALSE,
                                                  !.st = IF @ = "wait" THEN "error" ELSE @]
                              ELSE kid[k]]

\* complete: unregisters the children.
Done ==
    /\ phase' = "done"
    /\ prot' = [p \in Pages |-> FALSE]
    /\ cpu' = 0
    /\ kid' = [k \in Kids |-> [kid[k] EXCEPT !.watched = FALSE, !.st = IF @ = "wait" THEN "live" ELSE @]]

\* give_up: a delta that has all its pages is complete, whatever failed.
GiveUp ==
    IF AllFilled(filled) /\ On("what_is_remapped_stays_so") THEN Done ELSE Lost

\* CopyWork::step, CopyStage::Copy. A short run is released as soon as it is copied.
StepCopy(p) ==
    /\ phase = "pending" /\ stage = "copy" /\ ~filled[p] /\ \A q \in Pages : q < p => filled[q]
    /\ delta' = Filled(delta, p)
    /\ filled' = [filled EXCEPT ![p] = TRUE]
    /\ \E short \in BOOLEAN :
        /\ prot' = [prot EXCEPT ![p] = @ /\ ~short]
        /\ cpu' = IF cpu = p /\ short THEN 0 ELSE cpu
    /\ kid' = [k \in Kids |-> IF kid[k].st = "wait" /\ kid[k].p = p THEN [kid[k] EXCEPT !.st = "live"] ELSE kid[k]]
    /\ UNCHANGED <<parent, phase, stage, remapped, faults, image, dev>>

StepCopied ==
    /\ phase = "pending" /\ stage = "copy" /\ AllFilled(filled) /\ stage' = IF alive THEN "remap" ELSE "release"
    /\ UNCHANGED <<parent, delta, filled, prot, phase, remapped, cpu, faults, kid, image, dev>>

\* share_back: what is copied and still protected is mapped over the delta, in one step for every CPU.
StepRemap(p) ==
    /\ phase = "pending" /\ stage = "remap" /\ alive
    /\ filled[p] /\ kind[p] = "own" /\ (prot[p] \/ Off("only_what_is_protected_is_shared_back"))
    /\ HasCopy(p)
    /\ frame' = [frame EXCEPT ![p].in = "delta"]
    /\ remapped' = remapped \cup {p}
    /\ prot' = [prot EXCEPT ![p] = FALSE]
    /\ cpu' = IF cpu = p THEN 0 ELSE cpu
    /\ UNCHANGED <<kind, beneath, bytes, ex, map, pub, before, lock, alive, want, frozen, wrote, delta, filled, phase,
                   stage, faults, kid, image, dev>>

\* All that is worth it is remapped, or a mapping was refused.
StepRemapped ==
    /\ phase = "pending" /\ stage = "remap" /\ stage' = "release"
    /\ UNCHANGED <<parent, delta, filled, prot, phase, remapped, cpu, faults, kid, image, dev>>

\* CopyStage::Release
StepRelease(p) ==
    /\ phase = "pending" /\ stage = "release" /\ prot[p]
    /\ prot' = [prot EXCEPT ![p] = FALSE]
    /\ cpu' = IF cpu = p THEN 0 ELSE cpu
    /\ UNCHANGED <<parent, delta, filled, phase, stage, remapped, faults, kid, image, dev>>

StepComplete ==
    /\ phase = "pending"
    /\ \/ stage = "release" /\ \A p \in Pages : ~prot[p]
       \/ Off("watched_until_the_last_page") /\ \E p \in Pages : filled[p]
    /\ Done
    /\ UNCHANGED <<parent, delta, filled, stage, remapped, faults, image, dev>>

\* A copy, a release or a mapping fails, the thread panics, the userfaultfd is lost.
Failed ==
    /\ Fails /\ phase = "pending"
    /\ GiveUp
    /\ UNCHANGED <<parent, delta, filled, stage, remapped, faults, image, dev>>

\* copy_and_unprotect: copy, then release, then wake. Only what is protected.
LetGo(p) ==
    IF phase = "pending" /\ prot[p] /\ On("a_pin_settles_first")
    THEN /\ delta' = IF filled[p] \/ Off("copied_before_released") THEN delta ELSE Filled(delta, p)
         /\ filled' = [filled EXCEPT ![p] = @ \/ On("copied_before_released")]
         /\ prot' = [prot EXCEPT ![p] = FALSE]
    ELSE UNCHANGED <<delta, filled, prot>>

\* serve_writer, for a fault that may be older than what has happened since.
ServeWriter(p) ==
    /\ p \in faults
    /\ faults' = faults \ {p}
    /\ IF phase = "pending" /\ prot[p]
       THEN /\ delta' = IF filled[p] \/ Off("copied_before_released") THEN delta ELSE Filled(delta, p)
            /\ filled' = [filled EXCEPT ![p] = @ \/ On("copied_before_released")]
            /\ prot' = [prot EXCEPT ![p] = FALSE]
       ELSE UNCHANGED <<delta, filled, prot>>
    /\ cpu' = IF cpu = p THEN 0 ELSE cpu
    /\ UNCHANGED <<parent, phase, stage, remapped, kid, image, dev>>

\* serve_reader
ServeReader(k) ==
    /\ phase = "pending" /\ kid[k].st = "wait"
    /\ LET p == kid[k].p
       IN /\ delta' = IF filled[p] THEN delta ELSE Filled(delta, p)
          /\ filled' = [filled EXCEPT ![p] = TRUE]
    /\ kid' = [kid EXCEPT ![k].st = "live"]
    /\ UNCHANGED <<parent, phase, stage, remapped, prot, cpu, faults, image, dev>>

-----------------------------------------------------------------------------
(* Children.                                                               *)

\* adopt, and BackgroundCopy::attach under its lock: watched before it is live. A copy that has failed is refused.
Adopt(k) ==
    /\ image /\ kid[k].st = "none"
    /\ phase # "failed" \/ Off("a_failed_copy_is_refused")
    /\ kid' = [kid EXCEPT ![k] = [NoKid EXCEPT !.st = "live", !.watched = phase = "pending"]]
    /\ UNCHANGED <<parent, work, cpu, faults, image, dev>>

\* A read of a hole waits where it is watched. (Where it is not, it would be zeros: KidSees.)
KidRead(k, p) ==
    /\ kid[k].st = "live" /\ kid[k].watched /\ delta[p] = Hole
    /\ kid' = [kid EXCEPT ![k].st = "wait", ![k].p = p]
    /\ UNCHANGED <<parent, work, cpu, faults, image, dev>>

\* GuestRegion::drop, BackgroundCopy::detach
KidGoes(k) ==
    /\ kid[k].st \in {"live", "error"}
    /\ kid' = [kid EXCEPT ![k] = [NoKid EXCEPT !.st = "gone"]]
    /\ UNCHANGED <<parent, work, cpu, faults, image, dev>>

ImageGoes ==
    /\ image /\ Sweeps /\ image' = FALSE
    /\ UNCHANGED <<parent, work, cpu, faults, kid, dev>>

-----------------------------------------------------------------------------
(* The parent goes on.                                                     *)

Running == ~Freezing /\ alive /\ cpu = 0
Write(p, n) ==
    /\ bytes' = [bytes EXCEPT ![p] = n]
    /\ frame' = IF HasCopy(p) THEN frame ELSE [frame EXCEPT ![p] = [in |-> "copy", g |-> @.g + 1]]
    /\ want' = [want EXCEPT ![p] = n]
    /\ wrote' = n

\* A vCPU's write: to a protected page it waits.
GuestWrite(p) ==
    /\ Running /\ wrote < MaxWrites
    /\ IF prot[p]
       THEN cpu' = p /\ faults' = faults \cup {p} /\ UNCHANGED <<frame, bytes, want, wrote>>
       ELSE Write(p, wrote + 1) /\ UNCHANGED <<cpu, faults>>
    /\ UNCHANGED <<kind, beneath, ex, map, pub, before, lock, alive, frozen, work, kid, image, dev>>

\* DMA heeds no protection. It goes to the frame that was pinned.
DeviceWrite ==
    /\ dev.g # 0 /\ wrote < MaxWrites
    /\ LET p == dev.p
       IN /\ bytes' = IF HasCopy(p) /\ frame[p].g = dev.g THEN [bytes EXCEPT ![p] = wrote + 1] ELSE bytes
          /\ want' = [want EXCEPT ![p] = wrote + 1]
    /\ wrote' = wrote + 1
    /\ UNCHANGED <<kind, beneath, frame, ex, map, pub, before, lock, alive, frozen, work, cpu, faults, kid, image, dev>>

\* Word::try_pin, without a lock, at any moment.
PinFast(p) ==
    /\ Pins /\ alive /\ dev.p = 0 /\ ex[p]
    /\ dev' = [p |-> p, g |-> frame[p].g]
    /\ UNCHANGED <<parent, work, cpu, faults, kid, image>>

\* pin_locked: settle first, under the state lock, then break COW and count.
PinSettle(p) ==
    /\ Pins /\ alive /\ dev.p = 0 /\ lock = "" /\ ~ex[p] /\ ~Freezing
    /\ lock' = "pin" /\ dev' = [p |-> p, g |-> 0]
    /\ LetGo(p)
    /\ UNCHANGED <<kind, beneath, frame, bytes, ex, map, pub, before, alive, want, frozen, wrote, phase, stage, remapped,
                   cpu, faults, kid, image>>

PinCount ==
    /\ lock = "pin" /\ lock' = ""
    /\ LET p == dev.p
       IN /\ bytes' = [bytes EXCEPT ![p] = Sees(p)]
          /\ frame' = IF HasCopy(p) THEN frame ELSE [frame EXCEPT ![p] = [in |-> "copy", g |-> @.g + 1]]
          /\ ex' = [ex EXCEPT ![p] = TRUE]
          /\ dev' = [p |-> p, g |-> frame'[p].g]
    /\ UNCHANGED <<kind, beneath, map, pub, before, alive, want, frozen, wrote, work, cpu, faults, kid, image>>

Unpin ==
    /\ dev.p # 0 /\ dev.g # 0 /\ dev' = NoDev
    /\ UNCHANGED <<parent, work, cpu, faults, kid, image>>

\* absorb: takes note of what was remapped; a gap is shown from beneath again; a freeze that failed has never been.
Absorb ==
    /\ alive /\ lock = "" /\ before /\ phase \in {"done", "failed"}
    /\ lock' = "absorb"
    /\ map' = [p \in Pages |-> IF phase = "failed" \/ (kind[p] = "gap" /\ On("a_gap_is_shown_from_beneath"))
                               THEN "beneath" ELSE map[p]]
    /\ before' = On("a_view_goes_after_the_next_is_published")
    /\ UNCHANGED <<kind, beneath, frame, bytes, ex, pub, alive, want, frozen, wrote, work, cpu, faults, kid, image, dev>>

\* Locked::drop
Publish ==
    /\ lock = "absorb" /\ lock' = "" /\ pub' = map /\ before' = FALSE
    /\ UNCHANGED <<kind, beneath, frame, bytes, ex, map, alive, want, frozen, wrote, work, cpu, faults, kid, image, dev>>

\* discard, after drain has finished the copy and absorbed it.
Discard(p) ==
    /\ Takes /\ alive /\ lock = "" /\ ~Freezing /\ ~Pinned(p) /\ frame[p].in # "none"
    /\ On("drained_before_pages_go") => phase \in {"done", "failed", "refused"} /\ ~before
    /\ frame' = [frame EXCEPT ![p] = [in |-> "none", g |-> 0]]
    /\ want' = [want EXCEPT ![p] = 0]
    /\ ex' = [ex EXCEPT ![p] = FALSE]
    /\ map' = [map EXCEPT ![p] = "none"] /\ pub' = map'
    /\ UNCHANGED <<kind, beneath, bytes, before, lock, alive, frozen, wrote, work, cpu, faults, kid, image, dev>>

\* The VM goes; the filling keeps its memory until it is done, and what is beneath registered.
Dies1 ==
    /\ Dies /\ alive /\ lock = "" /\ ~Freezing /\ dev = NoDev /\ cpu = 0
    /\ alive' = FALSE /\ before' = FALSE
    /\ bytes' = IF On("a_filling_keeps_the_memory") THEN bytes ELSE [p \in Pages |-> 0]
    /\ UNCHANGED <<kind, beneath, frame, ex, map, pub, lock, want, frozen, wrote, work, cpu, faults, kid, image, dev>>

\* A sweep. (That it looks and punches in several steps is in Cow.tla.) An unfinished layer is not swept.
NamesBeneath(p) ==
    \/ alive /\ pub[p] = "beneath"
    \/ before
    \/ phase = "pending" /\ On("a_filling_keeps_what_is_beneath")
    \/ Freezing
NamesDelta(p) == image \/ (alive /\ pub[p] = "delta") \/ \E k \in Kids : kid[k].st \in {"live", "wait", "error"}
Sweep ==
    /\ Sweeps /\ ~Freezing
    /\ beneath' = [p \in Pages |-> IF NamesBeneath(p) THEN beneath[p] ELSE 0]
    /\ delta' = [p \in Pages |-> IF phase = "pending" \/ NamesDelta(p) \/ delta[p] = Hole THEN delta[p] ELSE 0]
    /\ UNCHANGED <<kind, frame, bytes, ex, map, pub, before, lock, alive, want, frozen, wrote, filled, prot, phase, stage,
                   remapped, cpu, faults, kid, image, dev>>

-----------------------------------------------------------------------------
Step == (\E p \in Pages : StepCopy(p) \/ StepRemap(p) \/ StepRelease(p)) \/ StepCopied \/ StepRemapped \/ StepComplete
Freeze == Plan \/ FillPinned \/ Protect \/ Start
Next ==
    \/ Freeze \/ Refuse \/ Step \/ Failed
    \/ \E p \in Pages : ServeWriter(p) \/ GuestWrite(p) \/ PinFast(p) \/ PinSettle(p) \/ Discard(p)
    \/ \E k \in Kids : Adopt(k) \/ ServeReader(k) \/ KidGoes(k) \/ \E p \in Pages : KidRead(k, p)
    \/ DeviceWrite \/ PinCount \/ Unpin \/ Absorb \/ Publish \/ ImageGoes \/ Dies1 \/ Sweep

\* The thread works and answers; the freeze goes on. Nobody says that a device ever lets go.
Fair ==
    /\ WF_vars(Freeze) /\ WF_vars(Step)
    /\ \A p \in Pages : WF_vars(ServeWriter(p))
    /\ \A k \in Kids : WF_vars(ServeReader(k))
Spec == Init /\ [][Next]_vars
FairSpec == Spec /\ Fair

-----------------------------------------------------------------------------
\* The bit says what the kernel confirms.
I2 == \A p \in Pages : ex[p] => HasCopy(p)

\* A pinned page is the same frame from pin to unpin, exclusive, and not protected.
I3 == dev.g # 0 => /\ ex[dev.p] /\ frame[dev.p] = [in |-> "copy", g |-> dev.g]
                   /\ ~prot[dev.p]

\* A finished page of a delta does not change while somebody names it.
I4 == [][\A p \in Pages : delta[p] # Hole /\ (phase = "pending" \/ NamesDelta(p)) => delta'[p] = delta[p]]_vars

\* A freeze that was refused or has failed takes nothing from the parent.
I13 == /\ phase = "refused" => \A p \in Pages : (HasCopy(p) /\ kind[p] = "own" /\ wrote = 0 => ex[p]) /\ ~prot[p]
       /\ phase = "failed" => remapped = {} /\ \A p \in Pages : ~prot[p] /\ (alive /\ ~before => map[p] # "delta")

\* What is shown of a layer is in the map, or in the view before, which is registered.
I14 == \A p \in Pages : alive /\ ~Freezing =>
        /\ frame[p].in = "delta" => map[p] = "delta"
        /\ frame[p].in = "beneath" => map[p] = "beneath" \/ before

GuestSees == alive => \A p \in Pages : Sees(p) = want[p]

\* What a child gets is its parent's bytes of the freeze's instant, or an error: never zeros in place of a hole.
KidSees == \A k \in Kids : kid[k].st = "live" => \A p \in Pages \ kid[k].lost :
    IF delta[p] = Hole THEN kid[k].watched ELSE delta[p] = frozen[p]

\* A page that is missing is one that can still come.
I5 == phase = "done" => \A p \in Pages : delta[p] # Hole

(* Liveness.                                                               *)
ChildGets == \A k \in Kids : kid[k].st = "wait" ~> kid[k].st # "wait"
WriterGoesOn == cpu # 0 ~> cpu = 0
\* Whatever a device holds.
FreezeNeverWaits == Freezing ~> ~Freezing
=============================================================================
