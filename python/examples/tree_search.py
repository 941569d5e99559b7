#!/usr/bin/env python3
"""Depth-first search in which each node is a fork of a running Python.

    examples/tree_search.py VM [QUEENS]

VM has an interpreter that answers expressions (`resources/python-image`). It puts QUEENS queens on a board
so that none attacks another. A node is a VM: its board is a list in the interpreter's memory. To try a
move, the node's VM is forked, and the child makes it. To go back, the child is stopped: nothing is undone.
"""

import ast
import sys
import time

from clade import Clade, Vm


def ask(vm: Vm, expression: str) -> object:
    """The value of an expression in the VM's interpreter."""
    done = vm.exec(["answer", expression], timeout=120)
    if done.exit_code:
        raise SystemExit(f"{vm.name}: {done.stderr.decode(errors='replace')}")
    return ast.literal_eval(done.text)


class Search:
    def __init__(self, queens: int) -> None:
        self.queens = queens
        self.forks = 0
        self.forking = 0.0

    def solve(self, node: Vm) -> object:
        """The solution below a node, or None."""
        board = ask(node, "state.setdefault('board', [])")
        assert isinstance(board, list)
        if len(board) == self.queens:
            return board
        for column in range(self.queens):
            if any(column == other or abs(column - other) == len(board) - row for row, other in enumerate(board)):
                continue
            begun = time.perf_counter()
            child = node.fork()
            self.forking += time.perf_counter() - begun
            self.forks += 1
            with child:
                ask(child, f"state['board'].append({column})")
                found = self.solve(child)
            if found:
                return found
        return None


def main() -> None:
    queens = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    search = Search(queens)
    begun = time.perf_counter()
    with Clade() as clade:
        found = search.solve(clade.vm(sys.argv[1]))
    took = time.perf_counter() - begun
    print(f"{queens} queens: {found}")
    print(f"{search.forks} forks in {took:.1f} s, {search.forking / max(search.forks, 1) * 1e3:.1f} ms each")


main()
