----------------------------- MODULE Ownership -----------------------------
(***************************************************************************)
(* One block of pages and its words: pin, unpin, share, split and merge at *)
(* the grain of the atomic steps of word.rs and ownership.rs. A loop of    *)
(* compare-and-swap is one step: it takes effect where it succeeds, or     *)
(* where it sees why it cannot. Memory is sequentially consistent here;    *)
(* the orderings are the loom models' (word.rs).                           *)
(*                                                                         *)
(* Devices pin a page or the whole block. Under the lock a changer freezes *)
(* and resets. fr[p] is the frame behind page p: 0 is the first layer's or *)
(* the birth file's page; each copy has the next number. owner says whose  *)
(* a frame is: the VM's, a layer's, or nobody's any more.                  *)
(***************************************************************************)
EXTENDS Naturals, FiniteSets, TLC, Rules

CONSTANTS Pages, Devices,
    Rounds,     \* pins of each device
    Changes,    \* freezes and resets
    MaxPins,
    MaxFrames   \* at least Changes: a page is copied once between two freezes

\* A record of the table: bit, count, "ask the pages" (or, in a page's, "ask the block, under the lock").
Word(ex, pins) == [ex |-> ex, pins |-> pins, split |-> FALSE]
Closed == [ex |-> FALSE, pins |-> 0, split |-> TRUE]
First(S) == CHOOSE p \in S : \A q \in S : p <= q

(* --algorithm Ownership
variables
    block = Word(TRUE, 0),
    page = [p \in Pages |-> Closed],
    lock = "",
    fr = [p \in Pages |-> 0],
    owner = [p \in Pages |-> [f \in 0..MaxFrames |-> "vm"]],
    held = [d \in Devices |-> [p \in Pages |-> 99]],     \* the frames a device was given; 99: none
    counted = [d \in Devices |-> {}];                    \* what it has counted, for I6

define
    Says(p) == IF block.split THEN page[p] ELSE block
    Known(p) == ~Says(p).split
    Exclusive(p) == Says(p).ex
    \* pin_locked and set_exclusive, where no split is under way.
    NotExclusive(range) == {p \in range : ~Exclusive(p)}
end define;

\* Word::try_pin of the block's record.
macro try_pin_block() begin
    if block.split then miss := "split";
    elsif ~block.ex then miss := "not exclusive";
    elsif block.pins >= MaxPins /\ On("a_count_never_wraps") then miss := "saturated";
    else
        block.pins := IF block.pins >= MaxPins THEN 0 ELSE block.pins + 1;
        counted[self] := range;
        miss := "";
    end if;
end macro;

process device \in Devices
variables range = {}, rest = {}, miss = "", rounds = 0, looked = FALSE, was = Closed, opening = {};
begin
Idle:
    while rounds < Rounds do
        rounds := rounds + 1;
        with r \in {{p} : p \in Pages} \cup {Pages} do range := r; end with;
        rest := range;
        \* OwnershipTable::try_pin, try_pin_piece.
TryBlock:
        if range = Pages \/ Off("a_part_is_counted_page_by_page") then
            if Off("bit_and_count_are_one_step") then
                looked := block.ex /\ ~block.split;
                miss := IF block.split THEN "split" ELSE "not exclusive";
            else
                try_pin_block();
            end if;
        elsif ~block.split then
            miss := "part";
        else
            miss := "split";
        end if;
Second:
        if Off("bit_and_count_are_one_step") /\ looked then
            \* Counted by itself, with nobody looking at the bit again: GUP-fast against fork.
            block.pins := block.pins + 1;
            counted[self] := range;
            miss := "";
        end if;
AfterBlock:
        if miss = "" then goto Hold;
        elsif miss = "saturated" then goto Idle;
        elsif miss # "split" then goto Locked;
        end if;
TryPages:
        while rest # {} do
            with p = First(rest) do
                if page[p].split then miss := "split"; goto Undo;
                elsif ~page[p].ex then miss := "not exclusive"; goto Undo;
                elsif page[p].pins >= MaxPins then miss := "saturated"; goto Undo;
                else
                    page[p].pins := page[p].pins + 1;
                    counted[self] := counted[self] \cup {p};
                    rest := rest \ {p};
                end if;
            end with;
        end while;
        goto Hold;
        \* On a miss nothing stays counted.
Undo:
        while counted[self] # {} do
            with p = First(counted[self]) do
                \* Not open yet: wait for the lock.
                if page[p].split then
                    await lock = "";
                else
                    page[p].pins := page[p].pins - 1;
                    counted[self] := counted[self] \ {p};
                end if;
            end with;
        end while;
        if miss = "saturated" then goto Idle; end if;
        \* GuestRegion::pin_locked
Locked:
        await lock = "";
        lock := "pin";
        rest := NotExclusive(range);
        \* populate_write: break COW, before the bit is set.
BreakCow:
        while rest # {} do
            with p = First(rest) do
                if owner[p][fr[p]] = "layer" /\ On("pin_unshares") then
                    fr[p] := fr[p] + 1;
                    owner[p][fr[p]] := "vm";
                end if;
                rest := rest \ {p};
            end with;
        end while;
        rest := NotExclusive(range);
        \* TableGuard::set_exclusive and split_partial: a part of a block is made page records first.
SetBlock:
        if rest = Pages /\ ~block.split then
            block.ex := TRUE;
            rest := {};
        end if;
SplitBlock:
        if (rest # {} \/ range # Pages) /\ ~block.split then
            \* TableGuard::split: try_split, then the pages' records are opened one by one.
            was := block;
            block := Closed;
            opening := Pages;
        end if;
OpenPages:
        while opening # {} do
            with p = First(opening) do
                page[p] := [was EXCEPT !.pins = IF On("a_split_carries_the_pins_over") THEN was.pins ELSE 0];
                opening := opening \ {p};
            end with;
        end while;
SetPages:
        while rest # {} do
            with p = First(rest) do
                page[p].ex := TRUE;
                rest := rest \ {p};
            end with;
        end while;
        rest := range;
        \* try_pin under the lock: nobody clears the bit or splits.
CountLocked:
        if ~block.split then
            try_pin_block();
            rest := {};
        else
            miss := "";
        end if;
CountPages:
        while rest # {} /\ miss = "" do
            with p = First(rest) do
                if page[p].pins >= MaxPins then miss := "saturated";
                else
                    page[p].pins := page[p].pins + 1;
                    counted[self] := counted[self] \cup {p};
                    rest := rest \ {p};
                end if;
            end with;
        end while;
        if miss = "saturated" then
            rest := counted[self];
GiveBack:   while rest # {} do
                with p = First(rest) do
                    page[p].pins := page[p].pins - 1;
                    counted[self] := counted[self] \ {p};
                    rest := rest \ {p};
                end with;
            end while;
            lock := "";
            goto Idle;
        end if;
LetGo:
        lock := "";
        \* The host is given the address, and takes the frames.
Hold:
        held[self] := [p \in Pages |-> IF p \in range THEN fr[p] ELSE 99];
        \* DmaPin::drop. Nothing says when; OwnershipTable::unpin.
Unpin:
        held[self] := [p \in Pages |-> 99];
        \* Word::unpin: Err where the record is split. R27's assertion is I3.
        if (range = Pages \/ Off("a_part_is_counted_page_by_page")) /\ ~block.split then
            block.pins := block.pins - 1;
            counted[self] := {};
            rest := {};
        else
            rest := range;
        end if;
UnpinPages:
        while rest # {} do
            with p = First(rest) do
                if page[p].split /\ On("an_unpin_waits_for_a_split") then
                    \* Refused while the block is being split: wait for that to be over.
                    await lock = "" \/ ~page[p].split;
                else
                    page[p].pins := IF page[p].pins = 0 THEN 0 ELSE page[p].pins - 1;
                    counted[self] := counted[self] \ {p};
                    rest := rest \ {p};
                end if;
            end with;
        end while;
    end while;
end process;

\* Freezes and resets, under the state lock and the table's.
process changer = "changer"
variables job = "", pinned = {}, todo = {}, changes = 0, closing = {}, first = Word(FALSE, 0), clear = FALSE;
begin
Begin:
    while changes < Changes do
        await lock = "";
        lock := "change";
        changes := changes + 1;
        with j \in {"freeze", "reset"} do job := j; end with;
        \* TableGuard::share of all pages: Word::try_share, in one step with the look at the count.
        if Off("a_reset_takes_the_bit_first") /\ job = "reset" then
            pinned := {p \in Pages : Says(p).pins > 0};
        elsif ~block.split then
            if block.ex /\ block.pins > 0 then pinned := Pages;
            elsif Off("share_is_one_step") then clear := TRUE;
            else block := Word(FALSE, 0);
            end if;
        else
            todo := Pages;
        end if;
ClearLate:
        if clear then
            \* The count was looked at, now the bit goes: two words, and nobody looks again.
            block := [block EXCEPT !.ex = FALSE];
            clear := FALSE;
        end if;
SharePages:
        while todo # {} do
            with p = First(todo) do
                if page[p].ex /\ page[p].pins > 0 then pinned := pinned \cup {p};
                elsif page[p].ex then page[p] := Word(FALSE, 0);
                end if;
                todo := todo \ {p};
            end with;
        end while;
        \* TableGuard::merge: closed one by one; a pin that comes in between ends it.
Merge:
        if block.split /\ (page[First(Pages)].pins = 0 \/ Off("a_merge_wants_one_owner_and_no_pin")) then
            first := page[First(Pages)];
            closing := Pages;
        end if;
ClosePages:
        while closing # {} do
            with p = First(closing) do
                if page[p] = first \/ Off("a_merge_wants_one_owner_and_no_pin") then
                    page[p] := Closed;
                    closing := closing \ {p};
                    todo := todo \cup {p};
                else
                    closing := {};
                end if;
            end with;
        end while;
        if todo = Pages then
            block := first;
            todo := {};
        end if;
Reopen:
        while todo # {} do
            with p = First(todo) do
                page[p] := first;
                todo := todo \ {p};
            end with;
        end while;
        \* What is not pinned becomes a layer's, or is dropped for what the layer has.
        todo := IF job = "freeze" /\ Off("a_freeze_spares_pinned_pages") THEN Pages ELSE Pages \ pinned;
Take:
        while todo # {} do
            with p = First(todo) do
                if job = "freeze" then
                    owner[p][fr[p]] := "layer";
                elsif job = "reset" /\ pinned = {} /\ owner[p][fr[p]] = "vm" /\ fr[p] > 0 then
                    owner[p][fr[p]] := "gone";
                    fr[p] := fr[p] - 1;
                end if;
                todo := todo \ {p};
            end with;
        end while;
        \* A refused reset gives back the bits of what is the VM's own, as the kernel says (GuestRegion::reclaim).
        todo := IF job = "reset" /\ pinned # {} /\ block.split THEN {p \in Pages : owner[p][fr[p]] = "vm"} ELSE {};
Restore:
        while todo # {} do
            with p = First(todo) do
                page[p].ex := TRUE;
                todo := todo \ {p};
            end with;
        end while;
Finish:
        pinned := {};
        lock := "";
    end while;
end process;

\* The guest writes: the kernel copies, and sets no bit. Not while the VM is paused.
process guest = "guest"
begin
Write:
    while TRUE do
        with p \in Pages do
            await lock # "change" /\ owner[p][fr[p]] = "layer";
            fr[p] := fr[p] + 1;
            owner[p][fr[p]] := "vm";
        end with;
    end while;
end process;
end algorithm; *)
\* BEGIN TRANSLATION - the hash of the PCal code: PCal-11e2b6338a62458e980887c31c1e1b65
VARIABLES block, page, lock, fr, owner, held, counted, pc

(* define statement *)
Says(p) == IF block.split THEN page[p] ELSE block
Known(p) == ~Says(p).split
Exclusive(p) == Says(p).ex

NotExclusive(range) == {p \in range : ~Exclusive(p)}

VARIABLES range, rest, miss, rounds, looked, was, opening, job, pinned, todo, 
          changes, closing, first, clear

vars == << block, page, lock, fr, owner, held, counted, pc, range, rest, miss, 
           rounds, looked, was, opening, job, pinned, todo, changes, closing, 
           first, clear >>

ProcSet == (Devices) \cup {"changer"} \cup {"guest"}

Init == (* Global variables *)
        /\ block = Word(TRUE, 0)
        /\ page = [p \in Pages |-> Closed]
        /\ lock = ""
        /\ fr = [p \in Pages |-> 0]
        /\ owner = [p \in Pages |-> [f \in 0..MaxFrames |-> "vm"]]
        /\ held = [d \in Devices |-> [p \in Pages |-> 99]]
        /\ counted = [d \in Devices |-> {}]
        (* Process device *)
        /\ range = [self \in Devices |-> {}]
        /\ rest = [self \in Devices |-> {}]
        /\ miss = [self \in Devices |-> ""]
        /\ rounds = [self \in Devices |-> 0]
        /\ looked = [self \in Devices |-> FALSE]
        /\ was = [self \in Devices |-> Closed]
        /\ opening = [self \in Devices |-> {}]
        (* Process changer *)
        /\ job = ""
        /\ pinned = {}
        /\ todo = {}
        /\ changes = 0
        /\ closing = {}
        /\ first = Word(FALSE, 0)
        /\ clear = FALSE
        /\ pc = [self \in ProcSet |-> CASE self \in Devices -> "Idle"
                                        [] self = "changer" -> "Begin"
                                        [] self = "guest" -> "Write"]

Idle(self) == /\ pc[self] = "Idle"
              /\ IF rounds[self] < Rounds
                    THEN /\ rounds' = [rounds EXCEPT ![self] = rounds[self] + 1]
                         /\ \E r \in {{p} : p \in Pages} \cup {Pages}:
                              range' = [range EXCEPT ![self] = r]
                         /\ rest' = [rest EXCEPT ![self] = range'[self]]
                         /\ pc' = [pc EXCEPT ![self] = "TryBlock"]
                    ELSE /\ pc' = [pc EXCEPT ![self] = "Done"]
                         /\ UNCHANGED << range, rest, rounds >>
              /\ UNCHANGED << block, page, lock, fr, owner, held, counted, 
                              miss, looked, was, opening, job, pinned, todo, 
                              changes, closing, first, clear >>

TryBlock(self) == /\ pc[self] = "TryBlock"
                  /\ IF range[self] = Pages \/ Off("a_part_is_counted_page_by_page")
                        THEN /\ IF Off("bit_and_count_are_one_step")
                                   THEN /\ looked' = [looked EXCEPT ![self] = block.ex /\ ~block.split]
                                        /\ miss' = [miss EXCEPT ![self] = IF block.split THEN "split" ELSE "not exclusive"]
                                        /\ UNCHANGED << block, counted >>
                                   ELSE /\ IF block.split
                                              THEN /\ miss' = [miss EXCEPT ![self] = "split"]
                                                   /\ UNCHANGED << block, 
                                                                   counted >>
                                              ELSE /\ IF ~block.ex
                                                         THEN /\ miss' = [miss EXCEPT ![self] = "not exclusive"]
                                                              /\ UNCHANGED << block, 
                                                                              counted >>
                                                         ELSE /\ IF block.pins >= MaxPins /\ On("a_count_never_wraps")
                                                                    THEN /\ miss' = [miss EXCEPT ![self] = "saturated"]
                                                                         /\ UNCHANGED << block, 
                                                                                         counted >>
                                                                    ELSE /\ block' = [block EXCEPT !.pins = IF block.pins >= MaxPins THEN 0 ELSE block.pins + 1]
                                                                         /\ counted' = [counted EXCEPT ![self] = range[self]]
                                                                         /\ miss' = [miss EXCEPT ![self] = ""]
                                        /\ UNCHANGED looked
                        ELSE /\ IF ~block.split
                                   THEN /\ miss' = [miss EXCEPT ![self] = "part"]
                                   ELSE /\ miss' = [miss EXCEPT ![self] = "split"]
                             /\ UNCHANGED << block, counted, looked >>
                  /\ pc' = [pc EXCEPT ![self] = "Second"]
                  /\ UNCHANGED << page, lock, fr, owner, held, range, rest, 
                                  rounds, was, opening, job, pinned, todo, 
                                  changes, closing, first, clear >>

Second(self) == /\ pc[self] = "Second"
                /\ IF Off("bit_and_count_are_one_step") /\ looked[self]
                      THEN /\ block' = [block EXCEPT !.pins = block.pins + 1]
                           /\ counted' = [counted EXCEPT ![self] = range[self]]
                           /\ miss' = [miss EXCEPT ![self] = ""]
                      ELSE /\ TRUE
                           /\ UNCHANGED << block, counted, miss >>
                /\ pc' = [pc EXCEPT ![self] = "AfterBlock"]
                /\ UNCHANGED << page, lock, fr, owner, held, range, rest, 
                                rounds, looked, was, opening, job, pinned, 
                                todo, changes, closing, first, clear >>

AfterBlock(self) == /\ pc[self] = "AfterBlock"
                    /\ IF miss[self] = ""
                          THEN /\ pc' = [pc EXCEPT ![self] = "Hold"]
                          ELSE /\ IF miss[self] = "saturated"
                                     THEN /\ pc' = [pc EXCEPT ![self] = "Idle"]
                                     ELSE /\ IF miss[self] # "split"
                                                THEN /\ pc' = [pc EXCEPT ![self] = "Locked"]
                                                ELSE /\ pc' = [pc EXCEPT ![self] = "TryPages"]
                    /\ UNCHANGED << block, page, lock, fr, owner, held, 
                                    counted, range, rest, miss, rounds, looked, 
                                    was, opening, job, pinned, todo, changes, 
                                    closing, first, clear >>

TryPages(self) == /\ pc[self] = "TryPages"
                  /\ IF rest[self] # {}
                        THEN /\ LET p == First(rest[self]) IN
                                  IF page[p].split
                                     THEN /\ miss' = [miss EXCEPT ![self] = "split"]
                                          /\ pc' = [pc EXCEPT ![self] = "Undo"]
                                          /\ UNCHANGED << page, counted, rest >>
                                     ELSE /\ IF ~page[p].ex
                                                THEN /\ miss' = [miss EXCEPT ![self] = "not exclusive"]
                                                     /\ pc' = [pc EXCEPT ![self] = "Undo"]
                                                     /\ UNCHANGED << page, 
                                                                     counted, 
                                                                     rest >>
                                                ELSE /\ IF page[p].pins >= MaxPins
                                                           THEN /\ miss' = [miss EXCEPT ![self] = "saturated"]
                                                                /\ pc' = [pc EXCEPT ![self] = "Undo"]
                                                                /\ UNCHANGED << page, 
                                                                                counted, 
                                                                                rest >>
                                                           ELSE /\ page' = [page EXCEPT ![p].pins = page[p].pins + 1]
                                                                /\ counted' = [counted EXCEPT ![self] = counted[self] \cup {p}]
                                                                /\ rest' = [rest EXCEPT ![self] = rest[self] \ {p}]
                                                                /\ pc' = [pc EXCEPT ![self] = "TryPages"]
                                                                /\ miss' = miss
                        ELSE /\ pc' = [pc EXCEPT ![self] = "Hold"]
                             /\ UNCHANGED << page, counted, rest, miss >>
                  /\ UNCHANGED << block, lock, fr, owner, held, range, rounds, 
                                  looked, was, opening, job, pinned, todo, 
                                  changes, closing, first, clear >>

Undo(self) == /\ pc[self] = "Undo"
              /\ IF counted[self] # {}
                    THEN /\ LET p == First(counted[self]) IN
                              IF page[p].split
                                 THEN /\ lock = ""
                                      /\ UNCHANGED << page, counted >>
                                 ELSE /\ page' = [page EXCEPT ![p].pins = page[p].pins - 1]
                                      /\ counted' = [counted EXCEPT ![self] = counted[self] \ {p}]
                         /\ pc' = [pc EXCEPT ![self] = "Undo"]
                    ELSE /\ IF miss[self] = "saturated"
                               THEN /\ pc' = [pc EXCEPT ![self] = "Idle"]
                               ELSE /\ pc' = [pc EXCEPT ![self] = "Locked"]
                         /\ UNCHANGED << page, counted >>
              /\ UNCHANGED << block, lock, fr, owner, held, range, rest, miss, 
                              rounds, looked, was, opening, job, pinned, todo, 
                              changes, closing, first, clear >>

Locked(self) == /\ pc[self] = "Locked"
                /\ lock = ""
                /\ lock' = "pin"
                /\ rest' = [rest EXCEPT ![self] = NotExclusive(range[self])]
                /\ pc' = [pc EXCEPT ![self] = "BreakCow"]
                /\ UNCHANGED << block, page, fr, owner, held, counted, range, 
                                miss, rounds, looked, was, opening, job, 
                                pinned, todo, changes, closing, first, clear >>

BreakCow(self) == /\ pc[self] = "BreakCow"
                  /\ IF rest[self] # {}
                        THEN /\ LET p == First(rest[self]) IN
                                  /\ IF owner[p][fr[p]] = "layer" /\ On("pin_unshares")
                                        THEN /\ fr' = [fr EXCEPT ![p] = fr[p] + 1]
                                             /\ owner' = [owner EXCEPT ![p][fr'[p]] = "vm"]
                                        ELSE /\ TRUE
                                             /\ UNCHANGED << fr, owner >>
                                  /\ rest' = [rest EXCEPT ![self] = rest[self] \ {p}]
                             /\ pc' = [pc EXCEPT ![self] = "BreakCow"]
                        ELSE /\ rest' = [rest EXCEPT ![self] = NotExclusive(range[self])]
                             /\ pc' = [pc EXCEPT ![self] = "SetBlock"]
                             /\ UNCHANGED << fr, owner >>
                  /\ UNCHANGED << block, page, lock, held, counted, range, 
                                  miss, rounds, looked, was, opening, job, 
                                  pinned, todo, changes, closing, first, clear >>

SetBlock(self) == /\ pc[self] = "SetBlock"
                  /\ IF rest[self] = Pages /\ ~block.split
                        THEN /\ block' = [block EXCEPT !.ex = TRUE]
                             /\ rest' = [rest EXCEPT ![self] = {}]
                        ELSE /\ TRUE
                             /\ UNCHANGED << block, rest >>
                  /\ pc' = [pc EXCEPT ![self] = "SplitBlock"]
                  /\ UNCHANGED << page, lock, fr, owner, held, counted, range, 
                                  miss, rounds, looked, was, opening, job, 
                                  pinned, todo, changes, closing, first, clear >>

SplitBlock(self) == /\ pc[self] = "SplitBlock"
                    /\ IF (rest[self] # {} \/ range[self] # Pages) /\ ~block.split
                          THEN /\ was' = [was EXCEPT ![self] = block]
                               /\ block' = Closed
                               /\ opening' = [opening EXCEPT ![self] = Pages]
                          ELSE /\ TRUE
                               /\ UNCHANGED << block, was, opening >>
                    /\ pc' = [pc EXCEPT ![self] = "OpenPages"]
                    /\ UNCHANGED << page, lock, fr, owner, held, counted, 
                                    range, rest, miss, rounds, looked, job, 
                                    pinned, todo, changes, closing, first, 
                                    clear >>

OpenPages(self) == /\ pc[self] = "OpenPages"
                   /\ IF opening[self] # {}
                         THEN /\ LET p == First(opening[self]) IN
                                   /\ page' = [page EXCEPT ![p] = [was[self] EXCEPT !.pins = IF On("a_split_carries_the_pins_over") THEN was[self].pins ELSE 0]]
                                   /\ opening' = [opening EXCEPT ![self] = opening[self] \ {p}]
                              /\ pc' = [pc EXCEPT ![self] = "OpenPages"]
                         ELSE /\ pc' = [pc EXCEPT ![self] = "SetPages"]
                              /\ UNCHANGED << page, opening >>
                   /\ UNCHANGED << block, lock, fr, owner, held, counted, 
                                   range, rest, miss, rounds, looked, was, job, 
                                   pinned, todo, changes, closing, first, 
                                   clear >>

SetPages(self) == /\ pc[self] = "SetPages"
                  /\ IF rest[self] # {}
                        THEN /\ LET p == First(rest[self]) IN
                                  /\ page' = [page EXCEPT ![p].ex = TRUE]
                                  /\ rest' = [rest EXCEPT ![self] = rest[self] \ {p}]
                             /\ pc' = [pc EXCEPT ![self] = "SetPages"]
                        ELSE /\ rest' = [rest EXCEPT ![self] = range[self]]
                             /\ pc' = [pc EXCEPT ![self] = "CountLocked"]
                             /\ page' = page
                  /\ UNCHANGED << block, lock, fr, owner, held, counted, range, 
                                  miss, rounds, looked, was, opening, job, 
                                  pinned, todo, changes, closing, first, clear >>

CountLocked(self) == /\ pc[self] = "CountLocked"
                     /\ IF ~block.split
                           THEN /\ IF block.split
                                      THEN /\ miss' = [miss EXCEPT ![self] = "split"]
                                           /\ UNCHANGED << block, counted >>
                                      ELSE /\ IF ~block.ex
                                                 THEN /\ miss' = [miss EXCEPT ![self] = "not exclusive"]
                                                      /\ UNCHANGED << block, 
                                                                      counted >>
                                                 ELSE /\ IF block.pins >= MaxPins /\ On("a_count_never_wraps")
                                                            THEN /\ miss' = [miss EXCEPT ![self] = "saturated"]
                                                                 /\ UNCHANGED << block, 
                                                                                 counted >>
                                                            ELSE /\ block' = [block EXCEPT !.pins = IF block.pins >= MaxPins THEN 0 ELSE block.pins + 1]
                                                                 /\ counted' = [counted EXCEPT ![self] = range[self]]
                                                                 /\ miss' = [miss EXCEPT ![self] = ""]
                                /\ rest' = [rest EXCEPT ![self] = {}]
                           ELSE /\ miss' = [miss EXCEPT ![self] = ""]
                                /\ UNCHANGED << block, counted, rest >>
                     /\ pc' = [pc EXCEPT ![self] = "CountPages"]
                     /\ UNCHANGED << page, lock, fr, owner, held, range, 
                                     rounds, looked, was, opening, job, pinned, 
                                     todo, changes, closing, first, clear >>

CountPages(self) == /\ pc[self] = "CountPages"
                    /\ IF rest[self] # {} /\ miss[self] = ""
                          THEN /\ LET p == First(rest[self]) IN
                                    IF page[p].pins >= MaxPins
                                       THEN /\ miss' = [miss EXCEPT ![self] = "saturated"]
                                            /\ UNCHANGED << page, counted, 
                                                            rest >>
                                       ELSE /\ page' = [page EXCEPT ![p].pins = page[p].pins + 1]
                                            /\ counted' = [counted EXCEPT ![self] = counted[self] \cup {p}]
                                            /\ rest' = [rest EXCEPT ![self] = rest[self] \ {p}]
                                            /\ miss' = miss
                               /\ pc' = [pc EXCEPT ![self] = "CountPages"]
                          ELSE /\ IF miss[self] = "saturated"
                                     THEN /\ rest' = [rest EXCEPT ![self] = counted[self]]
                                          /\ pc' = [pc EXCEPT ![self] = "GiveBack"]
                                     ELSE /\ pc' = [pc EXCEPT ![self] = "LetGo"]
                                          /\ rest' = rest
                               /\ UNCHANGED << page, counted, miss >>
                    /\ UNCHANGED << block, lock, fr, owner, held, range, 
                                    rounds, looked, was, opening, job, pinned, 
                                    todo, changes, closing, first, clear >>

GiveBack(self) == /\ pc[self] = "GiveBack"
                  /\ IF rest[self] # {}
                        THEN /\ LET p == First(rest[self]) IN
                                  /\ page' = [page EXCEPT ![p].pins = page[p].pins - 1]
                                  /\ counted' = [counted EXCEPT ![self] = counted[self] \ {p}]
                                  /\ rest' = [rest EXCEPT ![self] = rest[self] \ {p}]
                             /\ pc' = [pc EXCEPT ![self] = "GiveBack"]
                             /\ lock' = lock
                        ELSE /\ lock' = ""
                             /\ pc' = [pc EXCEPT ![self] = "Idle"]
                             /\ UNCHANGED << page, counted, rest >>
                  /\ UNCHANGED << block, fr, owner, held, range, miss, rounds, 
                                  looked, was, opening, job, pinned, todo, 
                                  changes, closing, first, clear >>

LetGo(self) == /\ pc[self] = "LetGo"
               /\ lock' = ""
               /\ pc' = [pc EXCEPT ![self] = "Hold"]
               /\ UNCHANGED << block, page, fr, owner, held, counted, range, 
                               rest, miss, rounds, looked, was, opening, job, 
                               pinned, todo, changes, closing, first, clear >>

Hold(self) == /\ pc[self] = "Hold"
              /\ held' = [held EXCEPT ![self] = [p \in Pages |-> IF p \in range[self] THEN fr[p] ELSE 99]]
              /\ pc' = [pc EXCEPT ![self] = "Unpin"]
              /\ UNCHANGED << block, page, lock, fr, owner, counted, range, 
                              rest, miss, rounds, looked, was, opening, job, 
                              pinned, todo, changes, closing, first, clear >>

Unpin(self) == /\ pc[self] = "Unpin"
               /\ held' = [held EXCEPT ![self] = [p \in Pages |-> 99]]
               /\ IF (range[self] = Pages \/ Off("a_part_is_counted_page_by_page")) /\ ~block.split
                     THEN /\ block' = [block EXCEPT !.pins = block.pins - 1]
                          /\ counted' = [counted EXCEPT ![self] = {}]
                          /\ rest' = [rest EXCEPT ![self] = {}]
                     ELSE /\ rest' = [rest EXCEPT ![self] = range[self]]
                          /\ UNCHANGED << block, counted >>
               /\ pc' = [pc EXCEPT ![self] = "UnpinPages"]
               /\ UNCHANGED << page, lock, fr, owner, range, miss, rounds, 
                               looked, was, opening, job, pinned, todo, 
                               changes, closing, first, clear >>

UnpinPages(self) == /\ pc[self] = "UnpinPages"
                    /\ IF rest[self] # {}
                          THEN /\ LET p == First(rest[self]) IN
                                    IF page[p].split /\ On("an_unpin_waits_for_a_split")
                                       THEN /\ lock = "" \/ ~page[p].split
                                            /\ UNCHANGED << page, counted, 
                                                            rest >>
                                       ELSE /\ page' = [page EXCEPT ![p].pins = IF page[p].pins = 0 THEN 0 ELSE page[p].pins - 1]
                                            /\ counted' = [counted EXCEPT ![self] = counted[self] \ {p}]
                                            /\ rest' = [rest EXCEPT ![self] = rest[self] \ {p}]
                               /\ pc' = [pc EXCEPT ![self] = "UnpinPages"]
                          ELSE /\ pc' = [pc EXCEPT ![self] = "Idle"]
                               /\ UNCHANGED << page, counted, rest >>
                    /\ UNCHANGED << block, lock, fr, owner, held, range, miss, 
                                    rounds, looked, was, opening, job, pinned, 
                                    todo, changes, closing, first, clear >>

device(self) == Idle(self) \/ TryBlock(self) \/ Second(self)
                   \/ AfterBlock(self) \/ TryPages(self) \/ Undo(self)
                   \/ Locked(self) \/ BreakCow(self) \/ SetBlock(self)
                   \/ SplitBlock(self) \/ OpenPages(self) \/ SetPages(self)
                   \/ CountLocked(self) \/ CountPages(self)
                   \/ GiveBack(self) \/ LetGo(self) \/ Hold(self)
                   \/ Unpin(self) \/ UnpinPages(self)

Begin == /\ pc["changer"] = "Begin"
         /\ IF changes < Changes
               THEN /\ lock = ""
                    /\ lock' = "change"
                    /\ changes' = changes + 1
                    /\ \E j \in {"freeze", "reset"}:
                         job' = j
                    /\ IF Off("a_reset_takes_the_bit_first") /\ job' = "reset"
                          THEN /\ pinned' = {p \in Pages : Says(p).pins > 0}
                               /\ UNCHANGED << block, todo, clear >>
                          ELSE /\ IF ~block.split
                                     THEN /\ IF block.ex /\ block.pins > 0
                                                THEN /\ pinned' = Pages
                                                     /\ UNCHANGED << block, 
                                                                     clear >>
                                                ELSE /\ IF Off("share_is_one_step")
                                                           THEN /\ clear' = TRUE
                                                                /\ block' = block
                                                           ELSE /\ block' = Word(FALSE, 0)
                                                                /\ clear' = clear
                                                     /\ UNCHANGED pinned
                                          /\ todo' = todo
                                     ELSE /\ todo' = Pages
                                          /\ UNCHANGED << block, pinned, clear >>
                    /\ pc' = [pc EXCEPT !["changer"] = "ClearLate"]
               ELSE /\ pc' = [pc EXCEPT !["changer"] = "Done"]
                    /\ UNCHANGED << block, lock, job, pinned, todo, changes, 
                                    clear >>
         /\ UNCHANGED << page, fr, owner, held, counted, range, rest, miss, 
                         rounds, looked, was, opening, closing, first >>

ClearLate == /\ pc["changer"] = "ClearLate"
             /\ IF clear
                   THEN /\ block' = [block EXCEPT !.ex = FALSE]
                        /\ clear' = FALSE
                   ELSE /\ TRUE
                        /\ UNCHANGED << block, clear >>
             /\ pc' = [pc EXCEPT !["changer"] = "SharePages"]
             /\ UNCHANGED << page, lock, fr, owner, held, counted, range, rest, 
                             miss, rounds, looked, was, opening, job, pinned, 
                             todo, changes, closing, first >>

SharePages == /\ pc["changer"] = "SharePages"
              /\ IF todo # {}
                    THEN /\ LET p == First(todo) IN
                              /\ IF page[p].ex /\ page[p].pins > 0
                                    THEN /\ pinned' = (pinned \cup {p})
                                         /\ page' = page
                                    ELSE /\ IF page[p].ex
                                               THEN /\ page' = [page EXCEPT ![p] = Word(FALSE, 0)]
                                               ELSE /\ TRUE
                                                    /\ page' = page
                                         /\ UNCHANGED pinned
                              /\ todo' = todo \ {p}
                         /\ pc' = [pc EXCEPT !["changer"] = "SharePages"]
                    ELSE /\ pc' = [pc EXCEPT !["changer"] = "Merge"]
                         /\ UNCHANGED << page, pinned, todo >>
              /\ UNCHANGED << block, lock, fr, owner, held, counted, range, 
                              rest, miss, rounds, looked, was, opening, job, 
                              changes, closing, first, clear >>

Merge == /\ pc["changer"] = "Merge"
         /\ IF block.split /\ (page[First(Pages)].pins = 0 \/ Off("a_merge_wants_one_owner_and_no_pin"))
               THEN /\ first' = page[First(Pages)]
                    /\ closing' = Pages
               ELSE /\ TRUE
                    /\ UNCHANGED << closing, first >>
         /\ pc' = [pc EXCEPT !["changer"] = "ClosePages"]
         /\ UNCHANGED << block, page, lock, fr, owner, held, counted, range, 
                         rest, miss, rounds, looked, was, opening, job, pinned, 
                         todo, changes, clear >>

ClosePages == /\ pc["changer"] = "ClosePages"
              /\ IF closing # {}
                    THEN /\ LET p == First(closing) IN
                              IF page[p] = first \/ Off("a_merge_wants_one_owner_and_no_pin")
                                 THEN /\ page' = [page EXCEPT ![p] = Closed]
                                      /\ closing' = closing \ {p}
                                      /\ todo' = (todo \cup {p})
                                 ELSE /\ closing' = {}
                                      /\ UNCHANGED << page, todo >>
                         /\ pc' = [pc EXCEPT !["changer"] = "ClosePages"]
                         /\ block' = block
                    ELSE /\ IF todo = Pages
                               THEN /\ block' = first
                                    /\ todo' = {}
                               ELSE /\ TRUE
                                    /\ UNCHANGED << block, todo >>
                         /\ pc' = [pc EXCEPT !["changer"] = "Reopen"]
                         /\ UNCHANGED << page, closing >>
              /\ UNCHANGED << lock, fr, owner, held, counted, range, rest, 
                              miss, rounds, looked, was, opening, job, pinned, 
                              changes, first, clear >>

Reopen == /\ pc["changer"] = "Reopen"
          /\ IF todo # {}
                THEN /\ LET p == First(todo) IN
                          /\ page' = [page EXCEPT ![p] = first]
                          /\ todo' = todo \ {p}
                     /\ pc' = [pc EXCEPT !["changer"] = "Reopen"]
                ELSE /\ todo' = (IF job = "freeze" /\ Off("a_freeze_spares_pinned_pages") THEN Pages ELSE Pages \ pinned)
                     /\ pc' = [pc EXCEPT !["changer"] = "Take"]
                     /\ page' = page
          /\ UNCHANGED << block, lock, fr, owner, held, counted, range, rest, 
                          miss, rounds, looked, was, opening, job, pinned, 
                          changes, closing, first, clear >>

Take == /\ pc["changer"] = "Take"
        /\ IF todo # {}
              THEN /\ LET p == First(todo) IN
                        /\ IF job = "freeze"
                              THEN /\ owner' = [owner EXCEPT ![p][fr[p]] = "layer"]
                                   /\ fr' = fr
                              ELSE /\ IF job = "reset" /\ pinned = {} /\ owner[p][fr[p]] = "vm" /\ fr[p] > 0
                                         THEN /\ owner' = [owner EXCEPT ![p][fr[p]] = "gone"]
                                              /\ fr' = [fr EXCEPT ![p] = fr[p] - 1]
                                         ELSE /\ TRUE
                                              /\ UNCHANGED << fr, owner >>
                        /\ todo' = todo \ {p}
                   /\ pc' = [pc EXCEPT !["changer"] = "Take"]
              ELSE /\ todo' = (IF job = "reset" /\ pinned # {} /\ block.split THEN {p \in Pages : owner[p][fr[p]] = "vm"} ELSE {})
                   /\ pc' = [pc EXCEPT !["changer"] = "Restore"]
                   /\ UNCHANGED << fr, owner >>
        /\ UNCHANGED << block, page, lock, held, counted, range, rest, miss, 
                        rounds, looked, was, opening, job, pinned, changes, 
                        closing, first, clear >>

Restore == /\ pc["changer"] = "Restore"
           /\ IF todo # {}
                 THEN /\ LET p == First(todo) IN
                           /\ page' = [page EXCEPT ![p].ex = TRUE]
                           /\ todo' = todo \ {p}
                      /\ pc' = [pc EXCEPT !["changer"] = "Restore"]
                 ELSE /\ pc' = [pc EXCEPT !["changer"] = "Finish"]
                      /\ UNCHANGED << page, todo >>
           /\ UNCHANGED << block, lock, fr, owner, held, counted, range, rest, 
                           miss, rounds, looked, was, opening, job, pinned, 
                           changes, closing, first, clear >>

Finish == /\ pc["changer"] = "Finish"
          /\ pinned' = {}
          /\ lock' = ""
          /\ pc' = [pc EXCEPT !["changer"] = "Begin"]
          /\ UNCHANGED << block, page, fr, owner, held, counted, range, rest, 
                          miss, rounds, looked, was, opening, job, todo, 
                          changes, closing, first, clear >>

changer == Begin \/ ClearLate \/ SharePages \/ Merge \/ ClosePages
              \/ Reopen \/ Take \/ Restore \/ Finish

Write == /\ pc["guest"] = "Write"
         /\ \E p \in Pages:
              /\ lock # "change" /\ owner[p][fr[p]] = "layer"
              /\ fr' = [fr EXCEPT ![p] = fr[p] + 1]
              /\ owner' = [owner EXCEPT ![p][fr'[p]] = "vm"]
         /\ pc' = [pc EXCEPT !["guest"] = "Write"]
         /\ UNCHANGED << block, page, lock, held, counted, range, rest, miss, 
                         rounds, looked, was, opening, job, pinned, todo, 
                         changes, closing, first, clear >>

guest == Write

Next == changer \/ guest
           \/ (\E self \in Devices: device(self))

Spec == Init /\ [][Next]_vars

\* END TRANSLATION - the hash of the generated TLA code (remove to silence divergence warnings): TLA-c07649236259c0cc154e982ac3cce370

-----------------------------------------------------------------------------
\* What has the bit is the VM's own: set after the copy, cleared before the page is shared.
I2 == \A p \in Pages : Known(p) /\ Exclusive(p) => owner[p][fr[p]] = "vm"

\* A frame a device was given is the page's, the VM's own and exclusive until it is unpinned.
I3 == \A d \in Devices : \A p \in Pages : held[d][p] # 99 =>
        /\ fr[p] = held[d][p] /\ owner[p][fr[p]] = "vm"
        /\ Known(p) => Exclusive(p)

\* Counts are exact, page by page (and never wrap).
I6 == \A p \in Pages : Known(p) => Says(p).pins = Cardinality({d \in Devices : p \in counted[d]})

\* While the block's record stands for its pages, they are alike: closed, and with one owner if it is exclusive.
I12 == ~block.split => \A p \in Pages : page[p] = Closed

\* A freeze or reset that has the lock lets it go, though no device ever unpins.
FreezeNeverWaits == lock = "change" ~> lock # "change"
Fair == /\ WF_vars(changer)
        /\ \A d \in Devices : WF_vars(device(d) /\ pc[d] # "Unpin")
FairSpec == Spec /\ Fair
\* A pin that has asked is given or refused.
PinGets == \A d \in Devices : pc[d] = "TryBlock" ~> pc[d] \in {"Hold", "Idle", "Unpin"}
=============================================================================
