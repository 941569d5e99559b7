// Elements, and numbers as people read them. Texts only ever become text nodes: names and labels
// are their users'.

export const byId = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

// Changes nothing that is the same already: what is read aloud is read once.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

const grouped = new Intl.NumberFormat("en");
export const number = (value) => grouped.format(value);
export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

export function size(kib) {
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (kib >= 1024 && at < units.length - 1) [kib, at] = [kib / 1024, at + 1];
  return `${kib >= 100 || at === 0 ? Math.round(kib) : kib.toFixed(1)} ${units[at]}`;
}

export function microseconds(us) {
  if (us < 1000) return `${Math.round(us)} µs`;
  return us < 1e6 ? `${Number((us / 1e3).toPrecision(3))} ms` : `${Number((us / 1e6).toPrecision(3))} s`;
}

export function age(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

export const sleep = (ms, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });

// Runs `step` again and again while the page is seen and `wanted` says so. A step that takes long
// is followed by a longer rest.
export class WhileSeen {
  #controller = null;
  #rest = null;
  #isDue = false;

  constructor(ms, wanted, step) {
    Object.assign(this, { ms, wanted, step });
    document.addEventListener("visibilitychange", () => this.look());
  }

  // Begins or ends, if what it depends on has changed.
  look() {
    if (document.hidden || !this.wanted()) this.#end();
    else if (!this.#controller) this.#run((this.#controller = new AbortController()).signal);
  }

  // Leaves the step that is under way, and begins another.
  restart() {
    this.#end();
    this.look();
  }

  // Has the next step be soon. One that is under way is done first.
  hurry() {
    this.#isDue = true;
    this.#rest?.abort();
  }

  #end() {
    this.#controller?.abort();
    this.#controller = null;
  }

  async #run(signal) {
    while (!signal.aborted) {
      const begun = performance.now();
      this.#isDue = false;
      await this.step(signal);
      await sleep(100, signal);
      if (this.#isDue || signal.aborted) continue;
      this.#rest = new AbortController();
      const rest = Math.max(this.ms, 4 * (performance.now() - begun));
      await sleep(rest, AbortSignal.any([signal, this.#rest.signal]));
    }
  }
}
