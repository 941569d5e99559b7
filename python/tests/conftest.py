"""One daemon and one VM with a warm Python for all tests that need them."""

import os
import pathlib
import subprocess
import time

import pytest

from clade import Agent, Clade, CladeError

from fakes import Awaited

NEEDED = ("CLADE", "CLADE_LINUX_GUEST", "CLADE_AGENT", "CLADE_PYTHON_IMAGE")


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    """A daemon in a directory of its own, and its environment."""
    missing = [name for name in NEEDED if not os.environ.get(name)]
    missing += [] if os.access("/dev/kvm", os.R_OK | os.W_OK) else ["/dev/kvm"]
    if missing:
        assert "client" not in os.environ.get("CLADE_REQUIRE", "").split(","), f"required, and missing: {missing}"
        pytest.skip(f"missing: {', '.join(missing)}")
    directory = tmp_path_factory.mktemp("run")
    env = {**os.environ, "CLADE_RUNTIME_DIR": str(directory), "CLADE_IMAGE_DIR": str(tmp_path_factory.mktemp("images"))}
    os.environ.update(env)
    process = subprocess.Popen([os.environ["CLADE"], "serve", "--pool", "0"], stderr=subprocess.DEVNULL)
    with Clade() as clade:
        looks = 0
        while True:
            looks += 1
            try:
                clade.calls.info()
                break
            except CladeError:
                assert looks < 3000 and process.poll() is None
                time.sleep(0.1)
        yield clade
        for vm in clade.vms():
            vm.stop()
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def warm(daemon):
    """A VM whose interpreter answers."""
    image = f"oci:{os.environ['CLADE_PYTHON_IMAGE']}:python"
    kernel = pathlib.Path(os.environ["CLADE_LINUX_GUEST"]) / "vmlinux"
    args = ["--image", image, "--mem", "256M", "--fresh", "--kernel", str(kernel)]
    vm = daemon.run("warm", *args, program=os.environ["CLADE"])
    looks = 0
    while "python answers" not in vm.console():
        looks += 1
        assert looks < 10_000, vm.console()
        time.sleep(0.2)
    return vm


@pytest.fixture(params=["plain", "awaited"])
def agent_at(request):
    """Agents behind a socket, of both kinds, with the same methods."""
    if request.param == "plain":
        return Agent
    return Awaited
