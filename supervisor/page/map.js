// The page map of a VM on a canvas: what each page is, as the kernel's page tables have it.

import { ask, ofVm, Problem } from "/page/api.js";
import { byId, element, number, plural, setText, WhileSeen } from "/page/dom.js";

const INTERVAL = 1000;
// How long a page lights up that has become something else.
const LIT_MS = 1000;
const CELLS = [10, 8, 6, 5, 4, 3, 2];
const HEIGHT = 288;
const KINDS = ["absent", "reference", "exclusive", "pinned", "shared"];
const PINNED = 3;
const SHARED = 4;
const LAYER_COLOURS = 6;
const WORDS = {
  exclusive: "its own",
  shared: "shared",
  pinned: "its own, pinned for DMA",
  reference: "zeros or a pattern",
  absent: "no memory",
};

// Reads the answer of `page-map`: numbers in LEB128 behind four bytes.
export function decode(buffer) {
  const bytes = new Uint8Array(buffer);
  if (String.fromCharCode(...bytes.subarray(0, 4)) !== "CPM1") throw new Error("this is no page map");
  let at = 4;
  const next = () => {
    let [value, unit] = [0, 1];
    for (;;) {
      const byte = bytes[at++];
      if (byte === undefined) throw new Error("the page map ends too soon");
      value += (byte & 0x7f) * unit;
      if (byte < 0x80) return value;
      unit *= 128;
    }
  };
  const from = next();
  const layers = Array.from({ length: next() }, next);
  const runs = Array.from({ length: next() }, () => ({ skip: next(), count: next(), kind: next() }));
  return { next: from, layers, runs };
}

// A whole map, in as many answers as it takes. Null if it is as it was.
async function fetchMap(name, tag, signal) {
  const whole = { layers: [], runs: [], tag: null };
  let from = 0;
  do {
    const headers = tag && from === 0 ? { "if-none-match": tag } : {};
    const response = await ask("GET", ofVm(name, `/page-map?from=${from}`), { signal, headers });
    if (response.status === 304) return null;
    const part = decode(await response.arrayBuffer());
    if (from === 0 && part.next === 0) whole.tag = response.headers.get("etag");
    let frame = from;
    for (const { skip, count, kind } of part.runs) {
      frame += skip;
      const layer = kind >= SHARED ? part.layers[kind - SHARED] : null;
      whole.runs.push({ first: frame, count, kind: Math.min(kind, SHARED), layer });
      frame += count;
    }
    from = part.next;
  } while (from !== 0);
  return whole;
}

// One byte a page: its kind; of a layer, 4 and the layer's place in the list.
function expand(map) {
  const total = map.runs.reduce((sum, run) => sum + run.count, 0);
  const pages = new Uint8Array(total);
  const counts = new Map(KINDS.map((kind) => [kind, 0]));
  map.layers = [...new Set(map.runs.map((run) => run.layer).filter((layer) => layer !== null))].sort((a, b) => a - b);
  const places = new Map(map.layers.map((layer, at) => [layer, SHARED + (at % (256 - SHARED))]));
  let at = 0;
  for (const run of map.runs) {
    pages.fill(run.layer === null ? run.kind : places.get(run.layer), at, at + run.count);
    counts.set(KINDS[run.kind], counts.get(KINDS[run.kind]) + run.count);
    at += run.count;
  }
  return { pages, counts };
}

export class PageMap {
  #canvas = byId("map");
  #name = null;
  #map = null;
  #pages = new Uint8Array();
  // What each cell stands for, and since when those that have changed are lit.
  #codes = new Uint8Array();
  #lit = new Map();
  #isOnScreen = true;
  #columns = 1;
  #cell = 1;
  #perCell = 1;
  #colours = {};
  #look;
  #reduced = matchMedia("(prefers-reduced-motion: reduce)");

  constructor() {
    this.#look = new WhileSeen(
      INTERVAL,
      () => this.#name !== null && this.#isOnScreen,
      (signal) => this.#refresh(signal),
    );
    new IntersectionObserver((entries) => {
      this.#isOnScreen = entries.at(-1).isIntersecting;
      this.#look.look();
    }).observe(this.#canvas);
    new ResizeObserver(() => this.#draw()).observe(this.#canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => setText(byId("map-cell"), ""));
    for (const kind of ["exclusive", "shared", "pinned", "reference", "absent"]) {
      const swatch = element("span", { className: `swatch ${kind}` });
      byId("legend").append(element("li", { id: `legend-${kind}` }, swatch, element("span"), element("b")));
    }
    byId("legend").append(
      element(
        "li",
        {},
        element("span", { className: "swatch lit" }),
        element("span", { textContent: "changed just now" }),
      ),
    );
  }

  show(name) {
    if (this.#name === name) return;
    this.#name = name;
    this.#map = null;
    this.#pages = new Uint8Array();
    this.#lit.clear();
    this.#draw();
    setText(byId("map-summary"), "");
    this.#look.restart();
  }

  // Looks again at once: something was done to the VM.
  refresh() {
    this.#look.hurry();
  }

  async #refresh(signal) {
    const name = this.#name;
    try {
      const map = await fetchMap(name, this.#map?.tag, signal);
      if (signal.aborted || name !== this.#name) return;
      if (map) this.#take(map);
      else this.#summarize(0);
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && [404, 410].includes(error.status)) this.show(null);
      else setText(byId("map-summary"), `The map is not to be had: ${error.message}`);
    }
  }

  #take(map) {
    const { pages, counts } = expand(map);
    const before = this.#pages;
    const isSame = before.length === pages.length && String(this.#map?.layers) === String(map.layers);
    const now = performance.now();
    let changed = 0;
    // What it was before it had other layers is not compared by their places, only by kind.
    const most = isSame ? 255 : SHARED;
    [this.#map, this.#pages, this.counts] = [map, pages, counts];
    this.#measure();
    if (before.length === pages.length) {
      let last = -1;
      for (let at = 0; at < pages.length; at += 1) {
        const code = pages[at];
        const earlier = before[at];
        if (code === earlier || (code >= most && earlier >= most)) continue;
        changed += 1;
        const cell = Math.floor(at / this.#perCell);
        if (cell !== last) this.#lit.set(cell, now);
        last = cell;
      }
    }
    this.#draw();
    this.#summarize(changed);
  }

  #summarize(changed) {
    const { counts } = this;
    const total = this.#pages.length;
    const share = (count) =>
      total ? `${((100 * count) / total).toFixed(count && count < total / 100 ? 2 : 0)} %` : "";
    for (const [kind, count] of counts) {
      const [, word, figure] = byId(`legend-${kind}`).children;
      const layers = kind === "shared" && count ? `, ${plural(this.#map.layers.length, "layer")}` : "";
      setText(word, `${WORDS[kind]}${layers}`);
      setText(figure, number(count));
    }
    const own = counts.get("exclusive") + counts.get("pinned");
    setText(
      byId("map-summary"),
      `${plural(total, "page")}: ${number(own)} its own (${share(own)}), ${number(counts.get("shared"))} shared, ` +
        `${number(counts.get("pinned"))} pinned. ${changed ? `${plural(changed, "page")} changed` : "None changed"} ` +
        `in the last second.${this.#perCell > 1 ? ` A cell is ${plural(this.#perCell, "page")}.` : ""}`,
    );
  }

  #palette() {
    const style = getComputedStyle(this.#canvas);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const codes = ["absent", "reference", "exclusive", "pinned"].map(colour);
    for (let at = 0; at < LAYER_COLOURS; at += 1) codes.push(colour(`shared-${at}`));
    return {
      codes,
      lit: colour("lit"),
      of: (code) => codes[code < SHARED ? code : SHARED + ((code - SHARED) % LAYER_COLOURS)],
    };
  }

  #measure() {
    const width = Math.max(64, this.#canvas.clientWidth);
    const total = Math.max(1, this.#pages.length);
    const room = (cell) => Math.floor(width / cell) * Math.floor(HEIGHT / cell);
    this.#cell = CELLS.find((cell) => room(cell) >= total) ?? CELLS.at(-1);
    this.#columns = Math.floor(width / this.#cell);
    const perCell = Math.ceil(total / room(this.#cell));
    // Cells are others then.
    if (perCell !== this.#perCell) this.#lit.clear();
    this.#perCell = perCell;
    const rows = Math.ceil(Math.ceil(total / this.#perCell) / this.#columns);
    return { width, height: Math.max(1, rows) * this.#cell };
  }

  // The codes that stand for the pages of each cell: pinned if one is, else what most of them are.
  #summary() {
    if (this.#perCell === 1) return this.#pages;
    const codes = new Uint8Array(Math.ceil(this.#pages.length / this.#perCell));
    const counts = new Uint32Array(256);
    for (let cell = 0; cell < codes.length; cell += 1) {
      const first = cell * this.#perCell;
      const last = Math.min(first + this.#perCell, this.#pages.length);
      counts.fill(0);
      let best = this.#pages[first];
      for (let at = first; at < last; at += 1) {
        const code = this.#pages[at];
        counts[code] += 1;
        if (counts[code] > counts[best]) best = code;
      }
      codes[cell] = counts[PINNED] > 0 ? PINNED : best;
    }
    return codes;
  }

  #draw() {
    const { width, height } = this.#measure();
    const ratio = window.devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    this.#canvas.style.height = `${height}px`;
    this.#colours = this.#palette();
    this.#codes = this.#summary();
    const context = this.#canvas.getContext("2d");
    this.#brush = null;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const side = this.#cell > 3 ? this.#cell - 1 : this.#cell;
    this.#codes.forEach((code, cell) => this.#paint(context, cell, side, this.#colours.of(code)));
    this.#light();
  }

  #brush = null;

  #paint(context, cell, side, colour) {
    // Setting it has the text read.
    if (colour !== this.#brush) context.fillStyle = this.#brush = colour;
    context.fillRect((cell % this.#columns) * this.#cell, Math.floor(cell / this.#columns) * this.#cell, side, side);
  }

  #isLighting = false;

  // Draws what is lit over its colour, fainter and fainter; or for as long as that takes, where
  // nothing is to move.
  #light() {
    if (this.#isLighting || this.#lit.size === 0) return;
    this.#isLighting = true;
    const frame = () => {
      const context = this.#canvas.getContext("2d");
      const now = performance.now();
      const side = this.#cell > 3 ? this.#cell - 1 : this.#cell;
      for (const [cell] of this.#lit) {
        if (cell < this.#codes.length) this.#paint(context, cell, side, this.#colours.of(this.#codes[cell]));
      }
      for (const [cell, since] of this.#lit) {
        const left = 1 - (now - since) / LIT_MS;
        if (left <= 0) this.#lit.delete(cell);
        if (left <= 0 || cell >= this.#codes.length) continue;
        context.globalAlpha = this.#reduced.matches ? 1 : left;
        this.#paint(context, cell, side, this.#colours.lit);
      }
      context.globalAlpha = 1;
      if (this.#lit.size > 0) requestAnimationFrame(frame);
      else this.#isLighting = false;
    };
    requestAnimationFrame(frame);
  }

  #point(event) {
    const [x, y] = [event.offsetX, event.offsetY].map((at) => Math.floor(at / this.#cell));
    const first = (y * this.#columns + x) * this.#perCell;
    if (x >= this.#columns || first >= this.#pages.length) return setText(byId("map-cell"), "");
    // Back to frames: there are gaps.
    let [left, frame] = [first, 0];
    for (const run of this.#map.runs) {
      if (left < run.count) {
        frame = run.first + left;
        break;
      }
      left -= run.count;
    }
    const code = this.#codes[first / this.#perCell];
    const what = code < SHARED ? WORDS[KINDS[code]] : `of layer ${this.#map.layers[code - SHARED]}`;
    setText(byId("map-cell"), `frame ${frame.toString(16)}: ${what}`);
  }
}
