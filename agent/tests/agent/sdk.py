"""What users of the SDK do, against an agent of this host. The first argument is a directory to work in."""
import functools
import io
import sys
import time

from e2b import (CommandExitException, FileNotFoundException, FileType, FilesystemEventType, InvalidArgumentException,
                 NotFoundException, PtySize, Sandbox, TimeoutException)

DIR = sys.argv[1]
box = Sandbox.create(request_timeout=0)
# The SDK gives a command a minute, which a busy machine may take for one.
box.commands.run = functools.partial(box.commands.run, timeout=0, request_timeout=0)


def raises(kind, work):
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def commands():
    done = box.commands.run("echo out; echo err >&2; echo $A; pwd", envs={"A": "1 2"}, cwd=DIR)
    assert (done.stdout, done.stderr, done.exit_code) == (f"out\n1 2\n{DIR}\n", "err\n", 0), done
    failed = raises(CommandExitException, lambda: box.commands.run("echo no >&2; exit 3"))
    assert (failed.exit_code, failed.stderr, failed.error) == (3, "no\n", "exit status 3"), failed
    pieces = []
    box.commands.run("for i in 1 2 3; do echo $i; sleep 0.1; done", on_stdout=pieces.append)
    assert "".join(pieces) == "1\n2\n3\n", pieces
    assert len(box.commands.run("seq 1 300000").stdout) == 1988895
    raises(TimeoutException, lambda: box.commands.run("sleep 100000", timeout=1))
    assert box.commands.run("id -un", user="nobody").stdout == "nobody\n"


def background():
    handle = box.commands.run("cat; echo end", background=True, stdin=True)
    assert any(one.pid == handle.pid and one.cmd == "/bin/bash" for one in box.commands.list())
    handle.send_stdin("one\n")
    box.commands.send_stdin(handle.pid, "two\n")
    handle.close_stdin()
    assert handle.wait().stdout == "one\ntwo\nend\n"
    handle = box.commands.run("sleep 600", background=True)
    handle.disconnect()
    again = box.commands.connect(handle.pid)
    assert again.kill() is True
    failed = raises(CommandExitException, again.wait)
    assert (failed.exit_code, failed.error) == (-1, "signal: killed"), failed
    assert box.commands.kill(handle.pid) is False


def terminals():
    text = bytearray()
    handle = box.pty.create(PtySize(rows=30, cols=90), cwd=DIR, envs={"PS1": "$ "})
    box.pty.resize(handle.pid, PtySize(rows=31, cols=91))
    box.pty.send_stdin(handle.pid, b"stty size; exit 4\n")
    failed = raises(CommandExitException, lambda: handle.wait(on_pty=text.extend))
    assert failed.exit_code == 4 and b"31 91" in text, text


def files():
    path, begun = f"{DIR}/a/b c/ä.txt", time.time()
    info = box.files.write(path, "hällo")
    assert (info.path, info.name, info.type) == (path, "ä.txt", FileType.FILE), info
    assert box.files.read(path) == "hällo"
    data = bytes(range(256)) * 4096
    box.files.write(f"{DIR}/bin", data)
    assert bytes(box.files.read(f"{DIR}/bin", format="bytes")) == data
    assert b"".join(box.files.read(f"{DIR}/bin", format="stream")) == data
    box.files.write(f"{DIR}/stream", io.BytesIO(data))
    box.files.write(f"{DIR}/packed", data, gzip=True)
    for name in ("stream", "packed"):
        assert bytes(box.files.read(f"{DIR}/{name}", format="bytes", gzip=True)) == data, name
    written = box.files.write_files([{"path": f"{DIR}/m/{n}", "data": str(n)} for n in range(5)])
    assert [one.name for one in written] == ["0", "1", "2", "3", "4"]
    listed = box.files.list(f"{DIR}/m")
    assert [(one.name, one.type, one.size) for one in listed] == [(str(n), FileType.FILE, 1) for n in range(5)]
    assert [one.name for one in box.files.list(DIR, depth=2) if one.name == "b c"] == ["b c"]
    info = box.files.get_info(path)
    assert (info.size, info.permissions, info.owner) == (6, "-rw-r--r--", "root"), info
    assert begun - 1 <= info.modified_time.timestamp() <= time.time() + 1, info
    moved = box.files.rename(path, f"{DIR}/z/moved")
    assert moved.path == f"{DIR}/z/moved" and not box.files.exists(path) and box.files.exists(moved.path)
    assert box.files.make_dir(f"{DIR}/new/dir") is True and box.files.make_dir(f"{DIR}/new/dir") is False
    box.files.remove(f"{DIR}/new")
    assert not box.files.exists(f"{DIR}/new")
    raises((NotFoundException, FileNotFoundException), lambda: box.files.read(f"{DIR}/nothing"))
    raises(InvalidArgumentException, lambda: box.files.read(DIR))
    raises((NotFoundException, FileNotFoundException), lambda: box.files.list(f"{DIR}/nothing"))
    noted = box.files.write(f"{DIR}/noted", "x", metadata={"Origin": "here"})
    assert noted.metadata == {"origin": "here"}, noted


def watches():
    watch = box.files.watch_dir(DIR, recursive=True)
    box.files.write(f"{DIR}/watched", "x")
    seen, looks = [], 0
    while (FilesystemEventType.WRITE, "watched") not in seen:
        looks += 1
        assert looks < 10_000, seen
        seen += [(event.type, event.name) for event in watch.get_new_events()]
        time.sleep(0.05)
    assert (FilesystemEventType.CREATE, "watched") in seen, seen
    watch.stop()


assert box.is_running()
for part in (commands, background, terminals, files, watches):
    part()
    print("the SDK's", part.__name__, "work")
