#!/usr/bin/env python3
"""The state graph of Ownership.tla, as the trace validator sees it.

Reads TLC's dump (`-dump dot,actionlabels`) and keeps of each state what memory/src/trace/records.rs keeps:
the records, who has the lock, what each device has counted, whose the frame behind each page is, and how
far a split or a merge has come. Steps that change nothing of this are left out, and what the rest of the
state decides (a device's range, a thread's place in its code) is left open.

Writes one line a state and its steps, sorted: STATE | STEP STATE | ...
"""
import re
import sys

RECORD = re.compile(r"\[ex \|-> (TRUE|FALSE), pins \|-> (\d+), split \|-> (TRUE|FALSE)\]")


def records(text):
    return ["?" if split == "TRUE" else ("x" if ex == "TRUE" else "-") + pins for ex, pins, split in RECORD.findall(text)]


def sets(text):
    return {who: frozenset(re.findall(r"\d+", of)) for who, of in re.findall(r"(\w+) :> \{([^}]*)\}", text)}


def load(path):
    states, steps = {}, []
    for line in open(path):
        node = re.match(r"(-?\d+) \[label=\"(.*?)\"(?:,style = filled)?\]", line)
        if node:
            text = node[2].replace('\\"', '"').replace("\\\\", "\\")
            states[node[1]] = dict(
                (name, value.replace("\\n", "")) for name, value in re.findall(r"/\\ (\w+) = (.*?)(?=\\n/\\ |$)", text)
            )
            continue
        edge = re.match(r"(-?\d+) -> (-?\d+) \[label=\"(\w+)", line)
        if edge:
            steps.append((edge[1], edge[2], edge[3]))
    return states, steps


def seen(state):
    """What the validator knows of a state."""
    pages = records(state["page"])
    block = records(state["block"])[0]
    counted = sets(state["counted"])
    frames = [int(n) for n in re.findall(r"\d+", state["fr"])]
    owners = re.findall(r"\(([^()]*)\)", state["owner"])
    own = "".join(
        "v" if re.search(rf'\b{frame} :> "vm"', owner) else "l" for frame, owner in zip(frames, owners)
    )
    opening = [of for of in sets(state["opening"]).values() if of]
    was = re.search(r"\bd\d+ :> \[", state["was"]) and dict(
        (who, records(of)[0]) for who, of in re.findall(r"(d\d+) :> (\[[^\]]*\])", state["was"])
    )
    doing = "quiet"
    if opening:
        who = [d for d, of in sets(state["opening"]).items() if of][0]
        doing = f"open{min(opening[0])}:{was[who]}"
    changer = re.search(r'"changer" :> "(\w+)"', state["pc"])[1]
    if changer in ("ClosePages", "Reopen"):
        todo = set(re.findall(r"\d+", state["todo"]))
        if todo:
            first = records(state["first"])[0]
            # Closed so far; put back so far.
            kind = "close" if min(todo) == "1" else f"back{min(todo)}-"
            doing = f"{kind}{max(todo)}:{first}"
    lock = state["lock"].strip('"') or "free"
    if lock == "pin":
        lock = "pin-" + re.search(r'(d\d+) :> "(?:BreakCow|SetBlock|SplitBlock|OpenPages|SetPages|CountLocked|CountPages|GiveBack|LetGo)"', state["pc"])[1]
    who = " ".join(f"{d}={''.join(sorted(of)) or '-'}" for d, of in sorted(counted.items()))
    return f"{block} {','.join(pages)} {own} {lock} {doing} {who}"


def step(a, b, action):
    """The name of a step, from what it changes."""
    (block, pages, own, lock, doing, *who), (block2, pages2, own2, lock2, doing2, *who2) = a.split(), b.split()
    pages, pages2 = pages.split(","), pages2.split(",")
    changed = [n + 1 for n, (p, q) in enumerate(zip(pages, pages2)) if p != q]
    device = [p.split("=")[0] for p, q in zip(who, who2) if p != q]
    return action, block != block2, changed, [n + 1 for n, (p, q) in enumerate(zip(own, own2)) if p != q], lock != lock2, device


NAMES = {
    "TryBlock": "PinBlock", "CountLocked": "PinBlock",
    "TryPages": "PinPage", "CountPages": "PinPage",
    "Undo": "UnpinPage", "GiveBack": "UnpinPage", "UnpinPages": "UnpinPage", "Unpin": "UnpinBlock",
    "Locked": "Lock", "LetGo": "Unlock", "Finish": "Unlock",
    "SetBlock": "SetBlock", "SetPages": "SetPage", "Restore": "SetPage",
    "SplitBlock": "Split", "OpenPages": "OpenPage",
    "SharePages": "SharePage", "ClosePages": "ClosePage", "Reopen": "ReopenPage",
    "BreakCow": "Own", "Write": "Own", "Take": "Take",
}


def main():
    states, steps = load(sys.argv[1])
    view = {name: seen(state) for name, state in states.items()}
    out = {state: set() for state in view.values()}
    for a, b, action in steps:
        a, b = view[a], view[b]
        if a != b:
            action, block, changed, own, lock, device = step(a, b, action)
            if action == "Begin" and block:
                # Two steps of the code: the lock is taken, then the bit is given up. Between them it is as if
                # a pin had been there when the lock was taken, and gone since.
                between = a.replace(" free ", " change ")
                out[a].add(f"Lock => {between}")
                out[between].add(f"ShareBlock => {b}")
                continue
            if action == "Begin":
                name = "Lock"
            elif action == "GiveBack" and lock:
                name = "Unlock"
            elif action == "ClosePages" and block:
                name = "Merge"
            else:
                name = NAMES[action]
            page = (changed or own or [""])[0]
            out[a].add(" ".join(filter(None, [name, str(page), *device, "=>", b])))
    for state in sorted(out):
        print(" | ".join([state, *sorted(out[state])]))


main()
