"""What users of E2B's SDK do, against E2B's API of a host. Arguments: the key of another user, a key that only reads, a template."""
import os
import sys
import time
from datetime import datetime, timedelta, timezone

import e2b.connection_config
import httpx
from e2b import (AuthenticationException, CommandExitException, NotFoundException, Sandbox, SandboxException, SandboxQuery,
                 SandboxState)

OTHER, READER, TEMPLATE = sys.argv[1:]
# By two URLs, or by a domain.
DOMAIN = os.environ.get("E2B_DOMAIN")
URL = os.environ.get("E2B_API_URL") or f"https://api.{DOMAIN}"
# The SDK gives a request a minute, which a busy machine may take for one.
e2b.connection_config.REQUEST_TIMEOUT = 3600.0
# The life of a sandbox that is to outlive its part of the test.
LONG = 7200


def token_of(box):
    return box.connection_config.sandbox_headers["X-Access-Token"]


def raises(kind, work):
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def patient(box):
    """The same sandbox, whose commands have as much time as they take: the SDK gives them a minute."""
    run = box.commands.run
    box.commands.run = lambda *args, **options: run(*args, **{"timeout": 0, **options})
    return box


def ids(paginator):
    found = []
    while paginator.has_next:
        found += [one.sandbox_id for one in paginator.next_items()]
    return found


def keys():
    error = raises(AuthenticationException, lambda: Sandbox.create(TEMPLATE, api_key="e2b_" + "0" * 40))
    assert "no such API key" in str(error), error
    error = raises(SandboxException, lambda: Sandbox.create(TEMPLATE, api_key=READER))
    assert "change nothing" in str(error), error
    error = raises(SandboxException, lambda: Sandbox.create("nothing"))
    assert "nothing" in str(error), error
    error = raises(SandboxException, lambda: Sandbox.create(TEMPLATE, timeout=100_000))
    assert "100000" in str(error), error


def lives(box):
    done = box.commands.run("echo out; echo err >&2; echo $OWN; pwd", cwd="/tmp")
    assert (done.stdout, done.stderr, done.exit_code) == ("out\n1 2\n/tmp\n", "err\n", 0), done
    assert raises(CommandExitException, lambda: box.commands.run("exit 3")).exit_code == 3
    handle = box.commands.run("head -n 1; echo end", background=True, stdin=True)
    box.commands.send_stdin(handle.pid, "one\n")
    assert handle.wait().stdout == "one\nend\n"
    data = bytes(range(256)) * 4096
    box.files.write("/tmp/bin", data)
    assert bytes(box.files.read("/tmp/bin", format="bytes")) == data
    assert [one.name for one in box.files.list("/tmp")] == ["bin"]
    load = box.get_metrics()[0]
    assert load.cpu_count == 1 and 0 < load.mem_used < load.mem_total, load
    assert box.is_running()
    box.files.write("/tmp/own", "parent")


def is_known(box):
    info = box.get_info()
    assert (info.sandbox_id, info.template_id, info.metadata) == (box.sandbox_id, TEMPLATE, {"who": "me & you"}), info
    assert info.state == SandboxState.RUNNING and info.cpu_count == 1 and info.memory_mb > 64, info
    left = (info.end_at - info.started_at).total_seconds()
    assert abs(left - LONG) < 1, left
    if hasattr(box, "update_network"):
        box.update_network({"allow_internet_access": False})
        error = raises(SandboxException, lambda: box.update_network({"deny_out": ["10.0.0.1/8"]}))
        assert "10.0.0.1/8" in str(error), error
        assert getattr(box.get_info(), "allow_internet_access", False) is False
        box.update_network({"deny_out": ["10.0.0.0/8"], "allow_out": ["10.0.0.1"]})
        if hasattr(box.get_info(), "network"):
            told = box.get_info().network
            assert (told["allow_out"], told["deny_out"]) == (["10.0.0.1"], ["10.0.0.0/8"]), told
    before = datetime.now(timezone.utc)
    box.set_timeout(LONG)
    end = box.get_info().end_at - timedelta(seconds=LONG)
    slack = timedelta(seconds=2)
    assert before - slack <= end <= datetime.now(timezone.utc) + slack, (before, end)
    assert ids(Sandbox.list(query=SandboxQuery(metadata={"who": "me & you"}))) == [box.sandbox_id]
    assert ids(Sandbox.list(query=SandboxQuery(metadata={"who": "me"}))) == []
    assert ids(Sandbox.list(query=SandboxQuery(state=[SandboxState.PAUSED]))) == []
    assert ids(Sandbox.list(api_key=OTHER)) == []
    raises(NotFoundException, lambda: Sandbox.get_info(box.sandbox_id, api_key=OTHER))
    raises(NotFoundException, lambda: Sandbox.connect(box.sandbox_id, api_key=OTHER))
    assert Sandbox.kill(box.sandbox_id, api_key=OTHER) is False


def forks(box):
    token = token_of(box)
    begun = time.time()
    children = [patient(child) for child in box.fork(count=2, timeout=LONG)]
    print(f"two forks were ready after {time.time() - begun:.2f} s")
    for number, child in enumerate(children):
        assert child.files.read("/tmp/own") == "parent"
        child.files.write("/tmp/own", str(number))
        assert token_of(child) != token
        child.commands.run('test "$OWN" = "1 2"')
    assert [child.files.read("/tmp/own") for child in children] == ["0", "1"]
    assert box.files.read("/tmp/own") == "parent"
    # The parent's token opens no child.
    own = {"E2b-Sandbox-Id": children[0].sandbox_id}
    for given, status in [(token, 401), (token[:-1], 401), (None, 401), (token_of(children[0]), 200)]:
        headers = own if given is None else {**own, "X-Access-Token": given}
        assert httpx.get(f"{URL}/files?path=/tmp/own", headers=headers, timeout=3600).status_code == status, given
    everyone = {box.sandbox_id, *[child.sandbox_id for child in children]}
    assert set(ids(Sandbox.list())) == everyone
    assert len(ids(Sandbox.list(limit=1))) == 3
    for child in children:
        assert child.kill() is True and child.kill() is False
        raises(NotFoundException, child.get_info)
    assert not children[0].is_running()
    assert ids(Sandbox.list()) == [box.sandbox_id]


def ports(box):
    # A guest whose kernel is interpreted needs seconds for its first TCP connection.
    def get(path, host, headers={}):
        if DOMAIN:
            return httpx.get(f"https://{host}{path}", headers=headers, timeout=3600)
        return httpx.get(URL + path, headers={"Host": host, **headers}, timeout=3600)

    box.commands.run("busybox httpd -p 127.0.0.1:8080 -h /tmp")
    served = [(box, "parent")]
    if hasattr(box, "fork"):
        child = patient(box.fork(timeout=LONG)[0])
        child.files.write("/tmp/own", "child")
        served.append((child, "child"))
    for one, text in served:
        assert one.get_host(8080) == f"8080-{one.sandbox_id}.{DOMAIN or 'box.test'}", one.get_host(8080)
        answer = get("/own", one.get_host(8080))
        assert (answer.status_code, answer.text) == (200, text), answer.text
        closed = get("/", one.get_host(8081))
        assert closed.status_code == 502 and "8081" in closed.json()["message"], closed.text
    for child, _ in served[1:]:
        child.kill()
    if not hasattr(box, "traffic_access_token"):
        print("the SDK has no traffic_access_token")
        return
    private = patient(Sandbox.create(TEMPLATE, timeout=LONG, network={"allow_public_traffic": False}))
    private.commands.run("busybox httpd -p 127.0.0.1:8080 -h /etc")
    assert get("/passwd", private.get_host(8080)).status_code == 403
    token = {"e2b-traffic-access-token": private.traffic_access_token}
    assert get("/passwd", private.get_host(8080), token).status_code == 200
    private.kill()
    assert box.traffic_access_token is None


def sleeps(box):
    # A clock that is wrong is set when the sandbox wakes.
    box.commands.run("date -s '2001-01-01 00:00:00'", user="root")
    pause = getattr(box, "pause", None) or box.beta_pause
    paused = [pause(), pause()]
    # Older SDKs do not say it.
    assert paused == [True, False] or not hasattr(box, "fork"), paused
    assert not box.is_running()
    assert box.get_info().state == SandboxState.PAUSED
    if hasattr(box, "fork"):
        # Its forks run, and it stays paused.
        child = patient(box.fork(timeout=LONG)[0])
        assert child.get_info().state == SandboxState.RUNNING and box.get_info().state == SandboxState.PAUSED
        assert child.kill()
    before = time.time()
    again = patient(Sandbox.connect(box.sandbox_id, timeout=LONG))
    assert again.files.read("/tmp/own") == "parent" and again.is_running()
    now = float(again.commands.run("date +%s").stdout)
    assert before - 2 <= now <= time.time() + 2, (before, now)


def snapshots(box):
    kept = box.create_snapshot(name="kept")
    assert ids_of(Sandbox.list_snapshots(sandbox_id=box.sandbox_id)) == [kept.snapshot_id]
    assert ids_of(Sandbox.list_snapshots(api_key=OTHER)) == []
    raises(SandboxException, lambda: Sandbox.create(kept.snapshot_id, api_key=OTHER))
    box.files.write("/tmp/own", "later")
    other = Sandbox.create(kept.snapshot_id, timeout=LONG)
    assert other.files.read("/tmp/own") == "parent"
    other.kill()
    assert Sandbox.delete_snapshot(kept.snapshot_id, api_key=OTHER) is False
    assert Sandbox.delete_snapshot(kept.snapshot_id) is True
    assert Sandbox.delete_snapshot(kept.snapshot_id) is False
    raises(SandboxException, lambda: Sandbox.create(kept.snapshot_id))


def ids_of(paginator):
    found = []
    while paginator.has_next:
        found += [one.snapshot_id for one in paginator.next_items()]
    return found


def ends():
    brief = Sandbox.create(TEMPLATE, timeout=2)
    if hasattr(box, "pause"):
        idle = Sandbox.create(TEMPLATE, timeout=2, lifecycle={"on_timeout": "pause", "auto_resume": True})
    else:
        idle = Sandbox.beta_create(TEMPLATE, timeout=2, auto_pause=True)
    looks = 0
    while brief.is_running() or idle.get_info().state != SandboxState.PAUSED:
        looks += 1
        assert looks < 3000
        time.sleep(0.2)
    # A request wakes it. Older SDKs cannot ask for that.
    if not hasattr(box, "pause"):
        idle = Sandbox.connect(idle.sandbox_id, timeout=LONG)
    assert patient(idle).commands.run("echo awake").stdout == "awake\n"
    assert idle.get_info().state == SandboxState.RUNNING
    idle.kill()


keys()
begun = time.time()
box = patient(Sandbox.create(TEMPLATE, timeout=LONG, metadata={"who": "me & you"}, envs={"OWN": "1 2"}, allow_internet_access=False))
print(f"a sandbox was ready after {time.time() - begun:.2f} s")
# First what gives the sandbox a longer life. Older SDKs know less.
parts = [(is_known, "get_info"), (lives, "commands"), (forks, "fork"), (ports, "get_host"), (sleeps, "get_info"), (snapshots, "create_snapshot")]
for part, needed in parts:
    if not hasattr(box, needed):
        print("the SDK has no", needed)
        continue
    part(box)
    print("the SDK's sandbox:", part.__name__)
box.kill()
ends()
print("the SDK's sandbox: ends")
