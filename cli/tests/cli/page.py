"""Drives the page in a browser: argument 1 is its address, 2 the file of axe-core, 3 how many pages the
guest has filled. CLADE_PAGE_TOKEN is the token. CLADE_PAGE_SHOTS names a directory for screenshots,
CLADE_PAGE_FILES one that the page's files are taken from instead of the program (while it is written)."""

import json
import os
import pathlib
import re
import sys
import time

from playwright.sync_api import sync_playwright

ADDRESS, AXE, FILLED = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
SHOTS = os.environ.get("CLADE_PAGE_SHOTS")
FILES = os.environ.get("CLADE_PAGE_FILES")
# Playwright's own waits, in ms: longer than a busy machine needs.
TIMEOUT = 900_000
# Looks at a condition of the page, 30 ms apart.
MOST_LOOKS = 20_000

TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class Watched:
    """A page whose requests, errors and violations of its policy are written down."""

    def __init__(self, browser, **options):
        self.said, self.elsewhere = [], []
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        self.context.set_default_timeout(TIMEOUT)
        self.context.add_init_script("""window.violations = []; window.longTasks = [];
            document.addEventListener("securitypolicyviolation",
                ({ violatedDirective, blockedURI, sourceFile, lineNumber, columnNumber }) =>
                    violations.push([violatedDirective, blockedURI, sourceFile, lineNumber, columnNumber].join(" ")));
            new PerformanceObserver((list) => longTasks.push(...list.getEntries().map((one) => one.duration)))
                .observe({ type: "longtask", buffered: true });""")
        self.page = self.context.new_page()
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.said.append(f"{said.text} {said.location}"))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on(
            "request", lambda asked: asked.url.startswith((ADDRESS, "data:")) or self.elsewhere.append(asked.url)
        )
        if FILES:
            self.page.route("**/*", self.serve)

    @staticmethod
    def serve(route):
        path = re.sub(r"^.*?//[^/]*", "", route.request.url).split("?")[0]
        file = pathlib.Path(FILES) / ("index.html" if path == "/" else path.removeprefix("/page/"))
        if route.request.resource_type not in ("document", "script", "stylesheet") or not file.is_file():
            return route.continue_()
        answer = route.fetch()
        route.fulfill(response=answer, body=file.read_bytes())

    def log_in(self):
        self.page.goto(ADDRESS)
        self.page.fill("#token", os.environ["CLADE_PAGE_TOKEN"])
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#tree .row")

    def see(self, script, argument=None):
        """Waits until the page says yes. What playwright has for it needs `eval`, which the policy forbids."""
        for _ in range(MOST_LOOKS):
            if self.page.evaluate(script, argument):
                return
            self.page.wait_for_timeout(30)
        raise AssertionError((script, argument, self.said, self.text("body")))

    def text(self, selector):
        return self.page.inner_text(selector)

    def clean(self):
        """Nothing was said, asked for elsewhere or forbidden."""
        violations = self.page.evaluate("violations")
        # A look at the map of a VM that has ended meanwhile. The browser says so, not the page.
        self.said = [said for said in self.said if not re.search(r" 404 .*/v1/vms/web-1/page-map", said)]
        assert not self.said, (self.said, violations)
        assert not self.elsewhere, self.elsewhere
        assert not violations, violations

    def shoot(self, name):
        if SHOTS:
            self.page.screenshot(path=f"{SHOTS}/{name}.png")

    def is_accessible(self, what):
        """axe-core finds nothing serious. It is run past the policy, which would not let it in."""
        # By the protocol: it is no script of the page.
        self.page.evaluate(AXE.read_text() + "; undefined")
        found = self.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical")]
        told = [(one["id"], one["help"], [node["html"][:200] for node in one["nodes"]][:3]) for one in serious]
        assert not told, (what, json.dumps(told, indent=1))


def rows(watched):
    return watched.page.eval_on_selector_all("#tree .row .name", "all => all.map((name) => name.textContent).sort()")


def counts(watched):
    """The figures of the map's legend."""
    texts = watched.page.eval_on_selector_all(
        "#legend li b", "all => all.map((one) => one.parentNode.id + ' ' + one.textContent)"
    )
    return {text.split()[0].removeprefix("legend-"): int(text.split()[1].replace(",", "")) for text in texts}


def wait_for_outcome(watched, text):
    watched.see("text => document.querySelector('#outcome').textContent.includes(text)", text)


def refuses_a_wrong_token(watched):
    page = watched.page
    page.goto(ADDRESS)
    assert page.evaluate("document.activeElement.id") == "token"
    page.fill("#token", "0123456789abcdef")
    page.keyboard.press("Enter")
    watched.see("() => document.querySelector('#login-error').textContent !== ''")
    assert not page.is_visible("#app")
    # The browser itself says that of an answer 401.
    assert all("401" in said for said in watched.said), watched.said
    watched.said.clear()


def forks(watched):
    page = watched.page
    watched.log_in()
    assert rows(watched) == ["web"]
    # A label is text, whatever it looks like.
    assert "tier=<b>x" in watched.text("#vm-facts") and page.query_selector("#vm-facts b") is None
    watched.see(
        "filled => Number(document.querySelector('#legend-exclusive b').textContent.replace(',', '')) >= filled", FILLED
    )
    before = counts(watched)
    assert before["shared"] == 0 and before["pinned"] == 0, before
    page.click("#fork")
    wait_for_outcome(watched, "web-1; web stood still for")
    watched.see("() => document.querySelectorAll('#tree .row').length === 2")
    assert rows(watched) == ["web", "web-1"]
    assert page.get_attribute("#tree .row:nth-child(1)", "aria-expanded") == "true"
    # What the parent owned it shares now.
    watched.see(
        "filled => Number(document.querySelector('#legend-shared b').textContent.replace(',', '')) >= filled", FILLED
    )
    after = counts(watched)
    assert after["exclusive"] < before["exclusive"], (before, after)
    assert sum(after.values()) == sum(before.values()) == 8192, (before, after)
    watched.see("() => document.querySelector('#pauses-text').textContent.includes('1 fork')")


def types(watched):
    """In the console of the child that was just made: it runs, for its parent was paused, and so is it."""
    page = watched.page
    page.click("#tree .row >> text=web-1")
    watched.see("() => document.querySelector('#vm-name').textContent === 'web-1'")
    if page.inner_text("#pause") == "Resume":
        page.click("#pause")
        wait_for_outcome(watched, "web-1 runs")
    watched.see("() => Number(document.querySelector('#legend-shared b').textContent.replace(',', '')) > 500")
    before = counts(watched)
    page.click("#console-open")
    watched.see("() => document.querySelector('#console-note').textContent.startsWith('Connected')")
    page.keyboard.type("forked while it runs")
    watched.see("() => document.querySelector('#console .xterm-rows').textContent.includes('FORKED')")
    watched.see("() => document.querySelector('#console .xterm-rows').textContent.includes('RUNS')")
    # Each byte has made a page of the layer its own, and those light up.
    watched.see(
        "own => Number(document.querySelector('#legend-exclusive b').textContent.replace(',', '')) >= own",
        before["exclusive"] + 20,
    )
    after = counts(watched)
    assert after["shared"] <= before["shared"] - 20, (before, after)
    page.keyboard.press("F6")
    assert page.evaluate("document.activeElement.id") == "console-open"


def goes_by_keys(watched):
    """Pause, resume, fork and stop without a pointer. The focus stays where it is."""
    page = watched.page
    # Above the stage where charts and events come, the tree.
    page.evaluate("document.querySelector('#tree').focus()")
    page.keyboard.press("Home")
    watched.see("() => document.querySelector('#vm-name').textContent === 'web'")
    page.keyboard.press("ArrowRight")
    watched.see("() => document.querySelector('#vm-name').textContent === 'web-1'")
    chosen = page.get_attribute("#tree", "aria-activedescendant")
    assert page.get_attribute(f"[id='{chosen}']", "aria-selected") == "true"
    page.keyboard.press("Enter")
    for wanted in ("count", "fork", "pause"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == wanted
    page.keyboard.press("Enter")
    wait_for_outcome(watched, "web-1 is paused")
    watched.see("() => document.querySelector('#pause').textContent === 'Resume'")
    assert page.evaluate("document.activeElement.id") == "pause", "lists that came meanwhile have not taken the focus"
    page.keyboard.press("Space")
    wait_for_outcome(watched, "web-1 runs")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for_outcome(watched, "is as it was forked")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "stop"
    page.keyboard.press("Enter")
    # The dialog asks, and it is no that has the focus.
    assert page.evaluate("document.activeElement.id") == "confirm-no"
    page.keyboard.press("Enter")
    watched.see("() => !document.querySelector('#confirm').open")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    watched.see("() => document.querySelectorAll('#tree .row').length === 1")
    # The list of VMs may come before the answer to the request, with which the page moves the focus.
    watched.see("() => document.activeElement.id === 'tree'")
    watched.see("() => document.querySelector('#events').textContent.includes('web-1 has ended')")
    page.fill("#count", "2")
    page.click("#fork")
    wait_for_outcome(watched, "2 children")
    watched.see("() => document.querySelectorAll('#tree .row').length === 3")


def large_map(asked):
    """The map of a guest of 16 GiB, of which each page is another kind than at the time before."""
    asked.append(len(asked))
    kinds = (b"\x00\x40\x01", b"\x00\x40\x02")
    pair = b"".join(kinds if len(asked) % 2 else kinds[::-1])
    # No more to ask for, no layers, 65,536 runs of 64 pages.
    return b"CPM1\x00\x00\x80\x80\x04" + pair * 32768


def lists_a_thousand(watched):
    """A thousand VMs, of which the supervisor knows nothing: their rows come without a stutter."""
    page = watched.page
    vm = lambda n, parent, generation: {
        "name": f"vm-{n}",
        "pid": 1,
        "state": "running",
        "parent": parent,
        "generation": generation,
        "cpus": 1,
        "age_s": 100 - generation,
        "labels": {"n": str(n)},
        "nets": [],
        "disks": [],
        "memory": {
            "mib": 512,
            "reference_pages": 1000,
            "shared_pages": 90000 + n,
            "exclusive_pages": 50 * (n % 700),
            "pinned_pages": 0,
            "private_kib": 200 * (n % 700),
        },
    }
    all_vms = [vm(0, None, 0)] + [vm(n, f"vm-{(n - 1) // 10}", len(str(n))) for n in range(1, 1000)]
    # Of the generation after its parent's.
    for one in all_vms[1:]:
        one["generation"] = all_vms[int(one["parent"][3:])]["generation"] + 1
        one["age_s"] = 100 - one["generation"]
    answer = json.dumps(all_vms)
    fulfil = lambda route: route.fulfill(status=200, content_type="application/json", body=answer)
    page.route("**/v1/vms", fulfil)
    page.route("**/v1/vms/*/page-map*", lambda route: route.fulfill(status=200, body=b"CPM1\x00\x00\x00"))
    # A long one is seen, so that none is none.
    page.evaluate("setTimeout(() => { for (const end = performance.now() + 90; performance.now() < end; ); })")
    watched.see("() => longTasks.some((one) => one >= 90)")
    page.evaluate("longTasks.length = 0")
    watched.see("() => document.querySelector('#totals').textContent.startsWith('1,000 VMs')")
    assert page.evaluate("document.querySelectorAll('#tree .row').length") < 100
    page.focus("#tree")
    page.keyboard.press("End")
    last = page.get_attribute("#tree", "aria-activedescendant")
    for key in ["PageUp"] * 10 + ["Home"] + ["ArrowDown"] * 10:
        page.keyboard.press(key)
    for at in range(0, 20000, 1000):
        page.evaluate("at => { document.querySelector('#tree').scrollTop = at; }", at)
    page.fill("#filter", "vm-99")
    watched.see("() => document.querySelector('#found').textContent !== ''")
    page.fill("#filter", "")
    # One list more, at least.
    page.wait_for_timeout(2500)
    longest = max(page.evaluate("longTasks"), default=0)
    print(f"1,000 VMs: the longest task took {longest:.0f} ms (50 ms and more are seen); the last row was {last}")


def draws_a_large_map(watched):
    """A guest of 16 GiB, all of which changes from one look to the next."""
    page = watched.page
    asked = []
    page.unroute("**/v1/vms/*/page-map*")
    page.route("**/v1/vms/*/page-map*", lambda route: route.fulfill(status=200, body=large_map(asked)))
    page.evaluate("longTasks.length = 0")
    watched.see("() => document.querySelector('#map-summary').textContent.includes('4,194,304 pages changed')")
    longest = max(page.evaluate("longTasks"), default=0)
    print(f"a map of 16 GiB that changes: the longest task took {longest:.0f} ms")


def main():
    with sync_playwright() as play:
        # As root there is no sandbox of the browser's.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=args)
        watched = Watched(browser, color_scheme="light")
        refuses_a_wrong_token(watched)
        watched.is_accessible("the login")
        forks(watched)
        types(watched)
        watched.clean()
        watched.shoot("page-light")
        watched.is_accessible("light")
        watched.page.emulate_media(color_scheme="dark")
        watched.is_accessible("dark")
        watched.shoot("page-dark")
        goes_by_keys(watched)
        watched.clean()
        lists_a_thousand(watched)
        draws_a_large_map(watched)
        before = len(watched.said)
        watched.page.click("#logout")
        watched.page.wait_for_selector("#login-form")
        # A request that was under way is refused. The browser says so, not the page.
        late = [said for said in watched.said[before:] if not re.search(r" 401 .*/v1/", said)]
        watched.said[before:] = late
        watched.clean()
        browser.close()


main()
