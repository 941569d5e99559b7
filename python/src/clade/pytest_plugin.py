"""A VM for tests, put back to the same instant before each.

    pytest --clade-vm warm

`warm` is a VM that runs, or a checkpoint, with all that the tests want: it is forked once, and is not
changed. The fixture `vm` is the child. A test may do to it what it likes: the next one finds it as it
was at the fork, processes and files in memory as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import Clade, Vm
from .errors import NoSuchCheckpointError


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("clade")
    group.addoption("--clade-vm", metavar="NAME", help="the VM or checkpoint whose child tests have as `vm`")
    group.addoption("--clade-url", metavar="URL", help="the daemon; that of this user's socket if not given")
    group.addoption("--clade-token-file", metavar="FILE", help="the token for --clade-url")


@pytest.fixture(scope="session")
def clade(request: pytest.FixtureRequest) -> Iterator[Clade]:
    """The daemon."""
    url, file = request.config.getoption("--clade-url"), request.config.getoption("--clade-token-file")
    token = None
    if file:
        with open(file) as opened:
            token = opened.read().strip()
    with Clade(url, token) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def _clade_child(request: pytest.FixtureRequest, clade: Clade) -> Iterator[Vm]:
    name = request.config.getoption("--clade-vm")
    if not name:
        pytest.skip("no VM is named: --clade-vm NAME")
    try:
        child = clade.checkpoint(name).fork()
    except NoSuchCheckpointError:
        child = clade.vm(name).fork()
    with child:
        yield child


@pytest.fixture
def vm(_clade_child: Vm) -> Iterator[Vm]:
    """A VM as it was when it was forked."""
    _clade_child.reset()
    yield _clade_child
