// A VM's console, by xterm.js: a stream of output, and requests with what is typed.
//
// xterm.js makes style elements and style attributes, which the page's policy forbids. The document
// makes others in their place: their rules go into a style sheet that the script adopts, and styles
// are set by CSSOM. Both are the script's own doing, and allowed.

import { ask, bytesOf, ofVm, Problem } from "/page/api.js";
import { byId, setText, sleep } from "/page/dom.js";

const MAX_TYPED = 32 << 10;

function sheetInPlaceOfStyle() {
  const sheet = new CSSStyleSheet();
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  const stands = document.createElement("span");
  stands.hidden = true;
  Object.defineProperty(stands, "textContent", { set: (text) => sheet.replaceSync(text), get: () => "" });
  stands.remove = () => {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((one) => one !== sheet);
    Element.prototype.remove.call(stands);
  };
  return stands;
}

function withStyleByCssom(made) {
  const setAttribute = made.setAttribute;
  made.setAttribute = function (name, value) {
    if (name === "style") this.style.cssText = value;
    else setAttribute.call(this, name, value);
  };
  return made;
}

// Its option `documentOverride` does not do: its scroll bar asks the window's document all the same.
function makeStylesAllowed() {
  const createElement = Document.prototype.createElement;
  document.createElement = (tag, options) => {
    if (tag === "style") return sheetInPlaceOfStyle();
    const made = createElement.call(document, tag, options);
    return tag === "span" ? withStyleByCssom(made) : made;
  };
}

export class Console {
  #button = byId("console-open");
  #place = byId("console");
  #name = null;
  #open = null;

  constructor() {
    this.#button.addEventListener("click", () => (this.#open ? this.close() : this.#start()));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      if (this.#open?.terminal) this.#open.terminal.options.theme = this.#theme();
    });
    document.addEventListener("visibilitychange", () => {
      if (!this.#open) return;
      if (document.hidden) this.#open.stream?.abort();
      else this.#follow(this.#open);
    });
  }

  show(name) {
    if (this.#name === name) return;
    this.close();
    this.#name = name;
  }

  close() {
    const open = this.#open;
    this.#open = null;
    open?.stream?.abort();
    open?.observer?.disconnect();
    open?.terminal?.dispose();
    this.#place.hidden = true;
    setText(this.#button, "Open");
    this.#button.setAttribute("aria-expanded", "false");
    setText(byId("console-note"), "");
  }

  #colour(name) {
    return getComputedStyle(this.#place).getPropertyValue(`--${name}`).trim();
  }

  #theme() {
    const [background, foreground, pick] = ["term", "term-ink", "term-pick"].map((name) => this.#colour(name));
    return { background, foreground, cursor: foreground, selectionBackground: pick };
  }

  async #start() {
    const open = { name: this.#name, typed: [], isSending: false };
    this.#open = open;
    this.#place.hidden = false;
    setText(this.#button, "Close");
    this.#button.setAttribute("aria-expanded", "true");
    makeStylesAllowed();
    const [{ Terminal }, { FitAddon }] = await Promise.all([
      import("/page/xterm/xterm.mjs"),
      import("/page/xterm/addon-fit.mjs"),
    ]);
    if (this.#open !== open) return;
    open.terminal = new Terminal({
      screenReaderMode: true,
      convertEol: false,
      fontSize: 13,
      fontFamily: this.#colour("mono"),
      scrollback: 5000,
      minimumContrastRatio: 4.5,
      // What a guest calls a link opens nothing.
      linkHandler: { activate: () => {} },
      theme: this.#theme(),
    });
    const fit = new FitAddon();
    open.terminal.loadAddon(fit);
    open.terminal.open(this.#place);
    fit.fit();
    open.observer = new ResizeObserver(() => fit.fit());
    open.observer.observe(this.#place);
    open.terminal.attachCustomKeyEventHandler((event) => {
      if (event.key !== "F6") return true;
      if (event.type === "keydown") this.#button.focus();
      event.preventDefault();
      return false;
    });
    const encoder = new TextEncoder();
    open.terminal.onData((text) => this.#type(open, encoder.encode(text)));
    open.terminal.onBinary((text) =>
      this.#type(
        open,
        Uint8Array.from(text, (one) => one.charCodeAt(0)),
      ),
    );
    open.terminal.focus();
    this.#follow(open);
  }

  // Shows the output until the VM ends, or the page is hidden; what is shown again begins anew.
  async #follow(open) {
    if (!open.terminal || this.#open !== open) return;
    open.stream?.abort();
    const stream = new AbortController();
    open.stream = stream;
    for (let wait = 500; this.#open === open && !stream.signal.aborted; wait = Math.min(2 * wait, 8000)) {
      try {
        const response = await ask("GET", ofVm(open.name, "/console"), { signal: stream.signal });
        open.terminal.reset();
        setText(byId("console-note"), "Connected. F6 leaves the console.");
        wait = 500;
        for await (const bytes of bytesOf(response)) open.terminal.write(bytes);
        setText(byId("console-note"), "The output has ended.");
      } catch (error) {
        if (stream.signal.aborted) return;
        const isOver = error instanceof Problem && [401, 404, 410].includes(error.status);
        setText(byId("console-note"), isOver ? "The VM has ended." : `Not connected: ${error.message}`);
        if (isOver) return;
      }
      await sleep(wait, stream.signal);
    }
  }

  // One request at a time, so that keys come in their order. What the VM has no room for waits.
  async #type(open, bytes) {
    // One by one: what is pasted may be more than a call's arguments.
    for (const byte of bytes) open.typed.push(byte);
    if (open.isSending) return;
    open.isSending = true;
    try {
      while (open.typed.length > 0 && this.#open === open) {
        const body = Uint8Array.from(open.typed.slice(0, MAX_TYPED));
        const { taken } = await (await ask("POST", ofVm(open.name, "/console"), { body })).json();
        open.typed.splice(0, taken);
        if (taken === 0) await sleep(100);
      }
    } catch (error) {
      open.typed.length = 0;
      setText(byId("console-note"), `What was typed did not arrive: ${error.message}`);
    } finally {
      open.isSending = false;
    }
  }
}
