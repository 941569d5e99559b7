#!/usr/bin/env python3
"""Fuzzes a parser in a VM that is reset after each case.

    examples/fuzz_loop.py VM [CASES]

VM has an interpreter that answers expressions (`resources/python-image`). The parser reads records of a
length and as many bytes, and raises an error where a record ends beyond the input: that is what is to be
found. It also keeps something of each case in the interpreter's memory. Each case is run in the same child
of VM, reset before: what one leaves the next does not see, which is checked.
"""

import random
import sys
import time

from clade import AgentError, Clade

# One expression, as the interpreter takes it. `seen` shows what a case finds of those before it.
PARSER = """
[seen := len(state.setdefault('cases', [])), state['cases'].append(1), data := bytes.fromhex('{case}'), at := 0,
 [(_ for _ in ()).throw(OverflowError('a record ends beyond the input')) if at + 1 + data[at] > len(data)
  else (at := at + 1 + data[at]) for _ in iter(lambda: at < len(data), False)], seen][-1]
"""


def main() -> None:
    cases = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    numbers = random.Random(1)
    found, resets = [], 0.0
    begun = time.perf_counter()
    with Clade() as clade, clade.vm(sys.argv[1]).fork() as child:
        for _ in range(cases):
            # A record that is right, and one that may have fewer bytes than it says.
            length = numbers.randrange(4)
            case = bytes([2, 7, 7, length]) + numbers.randbytes(min(length, 2))
            before = time.perf_counter()
            child.reset()
            resets += time.perf_counter() - before
            try:
                done = child.exec(["answer", " ".join(PARSER.format(case=case.hex()).split())], timeout=120)
            except AgentError as error:
                raise SystemExit(f"{child.name}: {error}") from error
            if done.exit_code:
                found.append((case.hex(), done.stderr.decode(errors="replace").strip()))
            elif done.text.strip() != "0":
                raise SystemExit(f"a case has seen {done.text.strip()} cases before it")
    took = time.perf_counter() - begun
    for case, why in found:
        print(f"{case}: {why}")
    print(f"{len(found)} of {cases} cases fail; {cases / took:.1f} cases a second, a reset {resets / cases * 1e3:.1f} ms")


main()
