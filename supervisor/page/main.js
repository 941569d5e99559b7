// The page: login, what is selected, what is done to it.

import { EventStream, get, hasKey, logIn, logOut, ofVm, onLogout, post, Problem } from "/page/api.js";
import { Charts } from "/page/charts.js";
import { Console } from "/page/console.js";
import { age, byId, element, microseconds, plural, setAttribute, setText, size, WhileSeen } from "/page/dom.js";
import { PageMap } from "/page/map.js";
import { grow, Tree } from "/page/tree.js";

const LIST_INTERVAL = 2000;
const MAX_EVENTS = 100;
// So many events at once are counted, not told one by one.
const MAX_TOLD = 5;

const tree = new Tree(select);
const map = new PageMap();
const terminal = new Console();
const charts = new Charts();
const events = new EventStream();
let selected = null;
let shown = { vms: [], checkpoints: [] };
let isBusy = false;
// The VM that is being stopped: nothing more is asked of it.
let leaving = null;

const lists = new WhileSeen(LIST_INTERVAL, () => !byId("app").hidden, refresh);
const follow = new WhileSeen(
  1000,
  () => !byId("app").hidden,
  (signal) => events.follow(signal, { each: take, connected }),
);

function connected(isConnected) {
  setText(byId("link"), isConnected ? "" : "The supervisor does not answer.");
}

async function refresh(signal) {
  try {
    const [vms, checkpoints] = await Promise.all([get("/v1/vms", signal), get("/v1/checkpoints", signal)]);
    if (signal.aborted) return;
    shown = { vms, checkpoints };
    if (!vms.some((vm) => vm.name === leaving)) leaving = null;
    connected(true);
    showAll();
  } catch (error) {
    if (!signal.aborted && !(error instanceof Problem && error.status === 401)) connected(false);
  }
}

function showAll() {
  const { vms, checkpoints } = shown;
  const roots = grow(vms, checkpoints);
  byId("no-vms").hidden = vms.length > 0 || checkpoints.length > 0;
  tree.show(roots);
  const owned = vms.reduce((sum, vm) => sum + (vm.memory?.private_kib ?? 0), 0);
  const parts = [plural(vms.length, "VM"), plural(roots.length, "clade")];
  if (checkpoints.length > 0) parts.push(plural(checkpoints.length, "checkpoint"));
  setText(byId("totals"), [...parts, `${size(owned)} owned`].join(" · "));
}

function select(node) {
  const vm = node?.vm ?? null;
  byId("vm").hidden = vm === null;
  byId("nothing").hidden = vm !== null;
  setText(
    byId("nothing"),
    node && !vm
      ? { ended: `${node.name} has ended.`, checkpoint: `${node.name} is a checkpoint.` }[node.kind]
      : "Select a VM.",
  );
  const isOther = selected?.name !== vm?.name;
  selected = vm;
  const live = vm && vm.name !== leaving ? vm.name : null;
  map.show(live);
  terminal.show(live);
  if (isOther) setText(byId("outcome"), "");
  if (!vm) return;
  setText(byId("vm-name"), vm.name);
  const parent = vm.parent ? `child of ${vm.parent}` : "booted";
  const labels = Object.entries(vm.labels ?? {}).map(([key, value]) => `${key}=${value}`);
  const memory = vm.memory ? [size(vm.memory.mib * 1024), `owns ${size(vm.memory.private_kib)}`] : [];
  const facts = [
    vm.state,
    parent,
    `generation ${vm.generation}`,
    plural(vm.cpus, "vCPU"),
    ...memory,
    `${age(vm.age_s)} old`,
  ];
  setText(byId("vm-facts"), [...facts, ...labels].join(" · "));
  setText(byId("pause"), { paused: "Resume", suspended: "Wake" }[vm.state] ?? "Pause");
  setAttribute(byId("reset"), "aria-disabled", vm.generation === 0 ? "true" : null);
  byId("reset").title = vm.generation === 0 ? "A VM that was booted has nothing to go back to." : "";
}

// Does something to the selected VM, says how it went, and looks again. Whether it is done.
async function act(work) {
  if (!selected || isBusy) return false;
  isBusy = true;
  let isDone = false;
  const outcome = byId("outcome");
  outcome.className = "";
  try {
    setText(outcome, await work(selected));
    isDone = true;
  } catch (error) {
    outcome.className = "error";
    setText(outcome, error.message);
  } finally {
    isBusy = false;
  }
  lists.hurry();
  map.refresh();
  return isDone;
}

byId("fork").addEventListener("click", () =>
  act(async (vm) => {
    const count = byId("count").valueAsNumber;
    if (!Number.isInteger(count) || count < 1) throw new Error(`"${byId("count").value}" is not a number of children.`);
    const { children, pause_us: pause } = await post(ofVm(vm.name, "/fork"), { count });
    const made = children.length > 1 ? plural(children.length, "child", "children") : children[0];
    return `${made}; ${vm.name} stood still for ${microseconds(pause)}.`;
  }),
);

byId("pause").addEventListener("click", () =>
  act(async (vm) => {
    const isPaused = vm.state === "paused" || vm.state === "suspended";
    await post(ofVm(vm.name, isPaused ? "/resume" : "/pause"));
    return `${vm.name} ${isPaused ? "runs" : "is paused"}.`;
  }),
);

byId("reset").addEventListener("click", () =>
  act(async (vm) => {
    if (vm.generation === 0) return byId("reset").title;
    const { dropped_pages: dropped, total_us: took } = await post(ofVm(vm.name, "/reset"));
    return `${vm.name} is as it was forked; ${plural(dropped, "page")} dropped in ${microseconds(took)}.`;
  }),
);

byId("stop").addEventListener("click", async () => {
  if (!selected) return;
  const { name } = selected;
  setText(byId("confirm-text"), `Stop ${name}? To its guest it is a power cut.`);
  if (!(await confirmed())) return;
  leaving = name;
  select(tree.active);
  const isDone = await act(async () => {
    await post(ofVm(name, "/stop"));
    return `${name} is stopped.`;
  });
  if (!isDone) leaving = null;
  byId("tree").focus();
});

function confirmed() {
  const dialog = byId("confirm");
  dialog.returnValue = "";
  dialog.showModal();
  byId("confirm-no").focus();
  return new Promise((resolve) => {
    const closed = () => {
      // The event of a dialog before this one may come as late as now.
      if (dialog.open) return;
      dialog.removeEventListener("close", closed);
      resolve(dialog.returnValue === "yes");
    };
    dialog.addEventListener("close", closed);
  });
}
byId("confirm-no").addEventListener("click", () => byId("confirm").close("no"));
byId("confirm-yes").addEventListener("click", () => byId("confirm").close("yes"));

const TOLD = {
  "vm.booted": ({ name }) => `${name} was booted`,
  "vm.forked": ({ parent, children, pause_us: pause }) => {
    const made = children.length > 3 ? plural(children.length, "child", "children") : children.join(", ");
    return `${parent} was forked: ${made}; it stood still for ${microseconds(pause)}`;
  },
  "vm.suspended": ({ name }) => `${name} was suspended`,
  "vm.woken": ({ name }) => `${name} was woken`,
  "vm.ended": ({ name, reason }) => `${name} has ended${reason ? `: ${reason}` : ""}`,
  "checkpoint.created": ({ name, vm }) => `checkpoint ${name} of ${vm} was taken`,
  "checkpoint.removed": ({ name }) => `checkpoint ${name} was removed`,
  "zygote.restarted": () => "the zygote was started again",
};

let isFirst = true;

function take(batch) {
  charts.take(batch);
  const told = batch.filter((event) => event.event in TOLD);
  const log = byId("events");
  // What was before the page came is not read aloud.
  setAttribute(byId("log"), "aria-live", isFirst || told.length > MAX_TOLD ? "off" : "polite");
  isFirst = false;
  const lines = told.slice(-MAX_EVENTS).map((event) => {
    const time = new Date(1e3 * event.at);
    const clock = element("time", {
      dateTime: time.toISOString(),
      textContent: time.toLocaleTimeString(undefined, { hour12: false }),
    });
    return element("li", {}, clock, ` ${TOLD[event.event](event)}`);
  });
  log.prepend(...lines.reverse());
  while (log.children.length > MAX_EVENTS) log.lastElementChild.remove();
  lists.hurry();
}

byId("filter").addEventListener("input", () => {
  const found = tree.filter(byId("filter").value);
  setText(byId("found"), byId("filter").value ? plural(found, "row") : "");
});

function showLogin() {
  byId("app").hidden = true;
  byId("login").hidden = false;
  terminal.show(null);
  map.show(null);
  lists.look();
  follow.look();
  byId("token").focus();
}

function showApp() {
  byId("login").hidden = true;
  byId("app").hidden = false;
  lists.look();
  follow.look();
  byId("tree").focus();
}

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setText(byId("login-error"), "");
  try {
    await logIn(byId("token").value);
    byId("token").value = "";
    showApp();
  } catch (error) {
    setText(byId("login-error"), error.message);
    byId("token").select();
  }
});
byId("logout").addEventListener("click", () => logOut().catch(() => {}));
onLogout(showLogin);

if (hasKey()) showApp();
else showLogin();
