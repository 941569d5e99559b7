"""Uses what runtimes and databases expect of a kernel. Prints a line for each, and its error if it is not there."""

import ctypes
import fcntl
import mmap
import os
import signal
import sqlite3
import struct

libc = ctypes.CDLL(None, use_errno=True)


def syscall(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(one) if isinstance(one, int) else one for one in arguments])
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def eventfd():
    descriptor = os.eventfd(3)
    assert os.eventfd_read(descriptor) == 3


def timerfd():
    descriptor = syscall(283, 1, 0)
    syscall(286, descriptor, 0, ctypes.c_char_p(struct.pack("qqqq", 0, 0, 0, 1000)), 0)
    assert struct.unpack("Q", os.read(descriptor, 8))[0] == 1


def signalfd():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    descriptor = syscall(289, -1, ctypes.c_char_p(struct.pack("Q", 1 << (signal.SIGUSR1 - 1))), 8, 0)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert struct.unpack("I", os.read(descriptor, 128)[:4])[0] == signal.SIGUSR1


def inotify():
    os.makedirs("/tmp/watched", exist_ok=True)
    descriptor = syscall(294, 0)
    watch = syscall(254, descriptor, ctypes.c_char_p(b"/tmp/watched"), 0x100)
    open("/tmp/watched/new", "w").close()
    assert struct.unpack("iI", os.read(descriptor, 4096)[:8]) == (watch, 0x100)


def locks():
    with open("/tmp/locked", "w") as first, open("/tmp/locked", "w") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.lockf(first, fcntl.LOCK_EX)
            return
    raise AssertionError("two have the lock")


def database():
    with sqlite3.connect("/srv/own.db") as own:
        own.execute("create table a (b)")
        own.execute("insert into a values (42)")
    assert sqlite3.connect("/srv/own.db").execute("select b from a").fetchall() == [(42,)]


def advice():
    with mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"x" * (1 << 16)
        memory.madvise(mmap.MADV_DONTNEED)
        assert memory[0] == 0
    with open("/etc/passwd") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)


def shared_memory():
    number = syscall(29, 0, 4096, 0o1600)
    syscall(31, number, 0, 0)


def message_queue():
    descriptor = syscall(240, ctypes.c_char_p(b"own"), os.O_RDWR | os.O_CREAT, 0o600, 0)
    syscall(242, descriptor, ctypes.c_char_p(b"text"), 4, 0, 0)


def barrier():
    assert syscall(324, 0, 0, 0) > 0


def asynchronous_io():
    context = ctypes.c_long(0)
    syscall(206, 4, ctypes.byref(context))
    syscall(207, context.value)


def io_uring():
    parameters = ctypes.create_string_buffer(120)
    os.close(syscall(425, 4, parameters))


def other_process():
    here, there = ctypes.create_string_buffer(b"text", 8), ctypes.create_string_buffer(8)
    vectors = [struct.pack("QQ", ctypes.addressof(one), 8) for one in (there, here)]
    assert syscall(310, os.getpid(), ctypes.c_char_p(vectors[0]), 1, ctypes.c_char_p(vectors[1]), 1, 0) == 8
    assert there.value == b"text"


def attributes():
    open("/tmp/attributes", "w").close()
    os.setxattr("/tmp/attributes", "trusted.own", b"1")
    assert os.getxattr("/tmp/attributes", "trusted.own") == b"1"


def filters():
    with open("/proc/self/status") as status:
        assert "Seccomp:\t0" in status.read()


for part in (eventfd, timerfd, signalfd, inotify, locks, database, advice, shared_memory, message_queue, barrier,
             asynchronous_io, io_uring, other_process, attributes, filters):
    try:
        part()
    except (OSError, AssertionError, sqlite3.Error) as error:
        print(f"{part.__name__}: {error!r}")
    else:
        print(f"{part.__name__}: is there")
