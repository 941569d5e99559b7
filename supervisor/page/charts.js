// Forks over time: how long each stopped its parent, and how many VMs there are.

import { byId, microseconds, plural, setText, svg } from "/page/dom.js";

const [WIDTH, HEIGHT] = [420, 132];
const EDGE = { left: 52, right: 10, top: 10, bottom: 20 };
const MAX_FORKS = 400;
const MAX_STEPS = 2000;

const clock = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
  hour12: false,
});

// Positions of values between the edges.
function scale(from, to, first, last) {
  const span = to - from || 1;
  return (value) => first + ((value - from) / span) * (last - first);
}

function frame(chart, ticks, y, span, x) {
  chart.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  const parts = ticks.map(({ at, text }) => [
    svg("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(at), y2: y(at) }),
    svg("text", { x: EDGE.left - 6, y: y(at) + 4, "text-anchor": "end" }, text),
  ]);
  const ends = [
    svg("text", { x: x(span[0]), y: HEIGHT - 4 }, clock.format(1e3 * span[0])),
    svg("text", { x: x(span[1]), y: HEIGHT - 4, "text-anchor": "end" }, clock.format(1e3 * span[1])),
  ];
  chart.replaceChildren(...parts.flat(), ...(span[1] > span[0] ? ends : ends.slice(0, 1)));
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

export class Charts {
  #forks = [];
  #steps = [];
  #names = new Set();
  #isDue = false;
  #clones = 0;

  take(events) {
    for (const event of events) {
      if (event.event === "vm.forked") {
        this.#forks.push(event);
        this.#clones += event.children.length;
      }
      if (event.event === "vm.created") this.#names.add(event.name);
      else if (event.event === "vm.ended") this.#names.delete(event.name);
      else continue;
      this.#steps.push({ at: event.at, vms: this.#names.size });
    }
    this.#forks.splice(0, this.#forks.length - MAX_FORKS);
    this.#steps.splice(0, this.#steps.length - MAX_STEPS);
    this.#draw();
  }

  // At most once a frame, and not while nobody sees it.
  #draw() {
    if (this.#isDue) return;
    this.#isDue = true;
    requestAnimationFrame(() => {
      this.#isDue = false;
      this.#drawPauses();
      this.#drawClones();
    });
  }

  #drawPauses() {
    const forks = this.#forks;
    if (forks.length === 0) return setText(byId("pauses-text"), "Pauses: no fork yet.");
    const sorted = forks.map((fork) => fork.pause_us).sort((one, other) => one - other);
    const last = sorted.at(-1);
    const [median, longest] = [quantile(sorted, 0.5), last].map(microseconds);
    setText(byId("pauses-text"), `Pauses of ${plural(forks.length, "fork")}: median ${median}, longest ${longest}.`);
    const low = Math.floor(Math.log10(Math.max(1, sorted[0])));
    const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(1, last) * 1.01)));
    const span = [forks[0].at, forks.at(-1).at];
    // One behind the other: forks come in bursts, and would stand on each other by the clock.
    const place = scale(0, forks.length - 1, EDGE.left + 6, WIDTH - EDGE.right - 6);
    const x = scale(...span, EDGE.left, WIDTH - EDGE.right);
    const y = scale(low, high, HEIGHT - EDGE.bottom, EDGE.top);
    const ticks = Array.from({ length: high - low + 1 }, (_, at) => ({
      at: low + at,
      text: microseconds(10 ** (low + at)),
    }));
    frame(byId("pauses"), ticks, y, span, x);
    const dots = forks.map((fork, at) => {
      const dot = svg("circle", { class: "dot", cx: place(at), cy: y(Math.log10(Math.max(1, fork.pause_us))), r: 2.5 });
      dot.append(
        svg(
          "title",
          {},
          `${fork.parent}: ${microseconds(fork.pause_us)}, ${plural(fork.children.length, "child", "children")}`,
        ),
      );
      return dot;
    });
    byId("pauses").append(...dots);
  }

  #drawClones() {
    const steps = this.#steps;
    if (steps.length === 0) return setText(byId("clones-text"), "VMs: none was made yet.");
    const most = Math.max(1, ...steps.map((step) => step.vms));
    setText(
      byId("clones-text"),
      `VMs: ${this.#names.size} now, ${most} at most; ${plural(this.#clones, "clone")} made.`,
    );
    const span = [steps[0].at, Math.max(steps.at(-1).at, Date.now() / 1e3)];
    const x = scale(...span, EDGE.left, WIDTH - EDGE.right);
    const y = scale(0, most, HEIGHT - EDGE.bottom, EDGE.top);
    frame(
      byId("clones"),
      [...new Set([0, Math.ceil(most / 2), most])].map((at) => ({ at, text: String(at) })),
      y,
      span,
      x,
    );
    const points = [`M${x(span[0])} ${y(0)}`];
    for (const step of steps) points.push(`H${x(step.at).toFixed(1)}V${y(step.vms).toFixed(1)}`);
    points.push(`H${x(span[1])}`);
    byId("clones").append(svg("path", { class: "line", d: points.join("") }));
  }
}
