"""Long tests of E2B's SDK. Arguments: `forks`, of which a hundred are made; `file` and its MiB."""
import hashlib
import os
import sys
import tempfile
import time

import e2b.connection_config
from e2b import Sandbox

e2b.connection_config.REQUEST_TIMEOUT = 3600.0
LIFE = 7200
MIB = 1 << 20

box = Sandbox.create("base", timeout=LIFE)


def forks():
    box.files.write("/tmp/own", "parent")
    begun = time.time()
    # The SDK takes 20 at most.
    children = [child for _ in range(5) for child in box.fork(count=20, timeout=LIFE)]
    print(f"a hundred forks were ready after {time.time() - begun:.1f} s")
    assert len({child.sandbox_id for child in children}) == 100
    assert len({child.connection_config.sandbox_headers["X-Access-Token"] for child in [box, *children]}) == 101
    for number, child in enumerate(children):
        assert child.files.read("/tmp/own") == "parent"
        child.files.write("/tmp/own", str(number))
    for number, child in enumerate(children):
        assert child.files.read("/tmp/own") == str(number)
    assert box.files.read("/tmp/own") == "parent"
    print(f"each had answered three calls after {time.time() - begun:.1f} s")
    for child in children:
        assert child.kill()


def file():
    mib = int(sys.argv[2])
    source = tempfile.TemporaryFile()
    digest = hashlib.sha256()
    for _ in range(mib):
        piece = os.urandom(MIB)
        digest.update(piece)
        source.write(piece)
    source.seek(0)
    begun = time.time()
    box.files.write("/tmp/big", source)
    print(f"{mib} MiB were written in {time.time() - begun:.1f} s", flush=True)
    assert box.files.get_info("/tmp/big").size == mib * MIB
    told = box.commands.run("sha256sum /tmp/big", timeout=0).stdout
    assert told.split()[0] == digest.hexdigest(), told
    begun, back, length = time.time(), hashlib.sha256(), 0
    for piece in box.files.read("/tmp/big", format="stream"):
        back.update(piece)
        length += len(piece)
    print(f"{mib} MiB were read in {time.time() - begun:.1f} s")
    assert (length, back.hexdigest()) == (mib * MIB, digest.hexdigest())


{"forks": forks, "file": file}[sys.argv[1]]()
assert box.kill()
