"""The client with a daemon and a Linux guest with a Python in it."""

import ast
import asyncio
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from clade import AgentError, AsyncCalls, AsyncClade, AsyncTransport, CladeError
from clade.errors import KINDS, NoSuchVmError

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


def ask(vm, expression):
    done = vm.exec(["answer", expression], timeout=7200)
    assert done.exit_code == 0, done
    return ast.literal_eval(done.text)


def test_forks_of_one_interpreter_go_their_own_ways(daemon, warm):
    seen, forked = [], threading.Event()

    def follow():
        for event in daemon.events():
            seen.append(event)
            if event.kind == "vm.forked":
                forked.set()
                return

    threading.Thread(target=follow, daemon=True).start()
    assert ask(warm, "state.setdefault('x', [])") == []
    point = warm.checkpoint("point")
    assert [one.name for one in daemon.checkpoints()] == ["point"]
    first, second = point.forks(2, name="child-{n}", labels={"of": "point"})
    with first, second:
        assert first.info()["labels"] == {"of": "point"}
        assert ask(first, "state['x'].append(1) or state['x']") == [1]
        assert ask(second, "state['x'].append(2) or state['x']") == [2]
        assert ask(warm, "state['x']") == []
        first.reset()
        assert ask(first, "state['x'].append(3) or state['x']") == [3]
        first.rollback(point)
        assert ask(first, "state['x'].append(4) or state['x']") == [4]
        assert first.reset(ready=True)["vm"]["name"] == first.name
        assert ask(first, "state['x']") == []
        assert first.stats()["copies"]["freeze"] >= 0 and second.pages()["totals"]["exclusive"] > 0
        second.pause()
        assert second.info()["state"] == "paused"
        second.resume()
        second.suspend()
        assert second.info()["state"] == "suspended"
        # Whoever asks wakes it.
        assert ask(second, "state['x']") == [2]
    with pytest.raises(NoSuchVmError):
        first.info()
    point.remove()
    assert forked.wait(7200), seen


def test_programs_and_files(warm):
    with warm.fork() as vm:
        done = vm.exec(["/bin/sh", "-c", "cat; echo no >&2; echo $A; pwd; exit 3"], b"in\n", {"A": "b"}, "/srv")
        assert (done.exit_code, done.stdout, done.stderr) == (3, b"in\nb\n/srv\n", b"no\n")
        data = bytes(range(256)) * 5000
        vm.write_file("/tmp/file", data)
        assert vm.read_file("/tmp/file") == data
        with pytest.raises(AgentError) as missing:
            vm.read_file("/tmp/none")
        assert missing.value.code == "not_found"
        with pytest.raises(AgentError):
            vm.exec(["/no/program"])
        with pytest.raises(AgentError) as late:
            vm.exec(["sleep", "100000"], timeout=2)
        assert late.value.code == "deadline_exceeded"
        vm.write_memory(0x1000, b"here")
        assert vm.read_memory(0x1000, 4) == b"here"


def test_what_is_wrong_is_named(daemon, warm):
    with pytest.raises(NoSuchVmError, match="none"):
        daemon.vm("none")
    with pytest.raises(CladeError) as bad:
        warm.forks(0)
    assert (bad.value.kind, bad.value.status) == ("bad-count", 400)
    with pytest.raises(CladeError) as booted:
        warm.reset()
    assert booted.value.kind in KINDS and booted.value.status == 409
    with pytest.raises(CladeError, match="--mem"):
        daemon.run("x", "--mem", "nothing", program=os.environ["CLADE"])


def test_the_same_awaited(daemon, warm):
    async def names():
        transport = AsyncTransport()
        found = [vm["name"] for vm in await AsyncCalls(transport).vms()]
        await transport.close()
        return found

    assert asyncio.run(names()) == ["warm"]


def test_forks_are_awaited_at_the_same_time(daemon, warm):
    async def one(vm, number):
        async with vm:
            done = await vm.exec(["answer", f"state.setdefault('y', {number}) or 0"], timeout=7200)
            assert done.exit_code == 0, done
            await vm.write_file("/tmp/n", str(number).encode() * 100_000)
            pieces = [piece async for piece in vm.follow(["/bin/sh", "-c", "cat; exit 4"], input=b"in")]
            assert pieces[-1].exit_code == 4 and b"".join(piece.data for piece in pieces[:-1]) == b"in"
            found = ast.literal_eval(done.text), await vm.read_file("/tmp/n")
            await (vm.rollback("awaited", ready=True) if number % 2 else vm.reset(ready=True))
            gone = await vm.exec(["/bin/sh", "-c", "test -e /tmp/n"], timeout=7200)
            assert gone.exit_code == 1, gone
            return found

    async def run():
        async with AsyncClade() as clade:
            parent = await clade.vm("warm")
            events = clade.events()
            first = asyncio.create_task(anext(events))
            while True:
                point = await parent.checkpoint("awaited")
                if (await asyncio.wait({first}, timeout=10))[0]:
                    break
                # The checkpoint was taken before the events were followed.
                await point.remove()
            assert first.result().kind.startswith(("vm.", "checkpoint."))
            await events.aclose()
            children = await point.forks(3, name="awaited-{n}")
            answers = await asyncio.gather(*(one(vm, number) for number, vm in enumerate(children, 1)))
            await point.remove()
            with pytest.raises(AgentError) as missing:
                await parent.read_file("/tmp/none")
            assert missing.value.code == "not_found"
            with pytest.raises(AgentError) as late:
                await parent.exec(["sleep", "100000"], timeout=2)
            assert late.value.code == "deadline_exceeded"
            with pytest.raises(CladeError, match="--mem"):
                await clade.run("x", "--mem", "nothing", program=os.environ["CLADE"])
            return answers, [vm.name for vm in await clade.vms()]

    answers, left = asyncio.run(run())
    assert answers == [(n, str(n).encode() * 100_000) for n in (1, 2, 3)] and left == ["warm"]


def test_a_vm_of_the_pytest_plugin_is_reset_between_tests(warm, tmp_path):
    (tmp_path / "test_leak.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('round', [1, 2])\n"
        "def test_nothing_is_left(vm, round):\n"
        "    done = vm.exec(['/bin/sh', '-c', 'ls /tmp/left; echo x >/tmp/left'], timeout=7200)\n"
        "    assert (done.exit_code, done.stdout) == (0, b''), done\n"
    )
    args = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--clade-vm", "warm", str(tmp_path)]
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("example", "args", "says"),
    [("tree_search.py", ["4"], "4 queens: [1, 3, 0, 2]"), ("fuzz_loop.py", ["4"], "cases a second")],
)
def test_the_examples_run(daemon, warm, example, args, says):
    done = subprocess.run([sys.executable, EXAMPLES / example, "warm", *args], capture_output=True, text=True)
    assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
    print(done.stdout)
    assert [vm.name for vm in daemon.vms()] == ["warm"]
