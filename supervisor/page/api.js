// The supervisor's API. A session is a cookie that this script cannot read, and a key that it keeps
// in the origin's storage and sends with each request.

import { sleep } from "/page/dom.js";

const KEY = "clade-session-key";
const session = new EventTarget();

export const onLogout = (listener) => session.addEventListener("logout", listener);
export const hasKey = () => localStorage.getItem(KEY) !== null;

function forget() {
  localStorage.removeItem(KEY);
  session.dispatchEvent(new Event("logout"));
}

export class Problem extends Error {
  constructor(status, kind, detail) {
    super(detail);
    [this.status, this.kind] = [status, kind];
  }
}

async function problem(response) {
  const { type = "", detail = response.statusText } = await response.json().catch(() => ({}));
  return new Problem(response.status, type, detail);
}

// A request of the session. `body` is sent as JSON, bytes as they are.
export async function ask(method, path, { body, headers = {}, signal } = {}) {
  const isBytes = body instanceof Uint8Array;
  const type = isBytes ? "application/octet-stream" : "application/json";
  const response = await fetch(path, {
    method,
    signal,
    cache: "no-store",
    credentials: "same-origin",
    headers: { [KEY]: localStorage.getItem(KEY) ?? "", ...(body ? { "content-type": type } : {}), ...headers },
    body: body && !isBytes ? JSON.stringify(body) : body,
  });
  if (response.status === 401) forget();
  if (!response.ok && response.status !== 304) throw await problem(response);
  return response;
}

export const get = async (path, signal) => (await ask("GET", path, { signal })).json();
export const post = async (path, body) => (await ask("POST", path, { body })).json();
export const ofVm = (name, rest = "") => `/v1/vms/${encodeURIComponent(name)}${rest}`;

export async function logIn(token) {
  const response = await fetch("/v1/session", {
    method: "POST",
    credentials: "same-origin",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ token }),
  });
  if (!response.ok) throw await problem(response);
  localStorage.setItem(KEY, (await response.json()).key);
}

export async function logOut() {
  try {
    await ask("DELETE", "/v1/session");
  } finally {
    forget();
  }
}

// The bytes of a stream until it ends.
export async function* bytesOf(response) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// An id that no supervisor gives: the answer to it begins with all events that are kept.
const FROM_THE_FIRST = "page-0";

// Follows the events until `signal`, and comes back to where it was when the connection is lost.
export class EventStream {
  last = FROM_THE_FIRST;

  async follow(signal, { each, connected }) {
    let wait = 500;
    while (!signal.aborted) {
      try {
        const response = await ask("GET", "/v1/events", { signal, headers: { "last-event-id": this.last } });
        wait = 500;
        connected(true);
        await this.#read(response, each);
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof Problem && error.status === 401) return;
        if (error instanceof Problem && error.status === 400) this.last = FROM_THE_FIRST;
      }
      if (signal.aborted) return;
      connected(false);
      await sleep(wait, signal);
      wait = Math.min(2 * wait, 10_000);
    }
  }

  async #read(response, each) {
    const decoder = new TextDecoder();
    let rest = "";
    for await (const bytes of bytesOf(response)) {
      const blocks = (rest + decoder.decode(bytes, { stream: true })).split("\n\n");
      rest = blocks.pop();
      const events = [];
      for (const block of blocks) {
        const fields = new Map(block.split("\n").map((line) => line.split(/: ?(.*)/s)));
        if (fields.has("id")) this.last = fields.get("id");
        if (fields.has("data")) events.push(JSON.parse(fields.get("data")));
      }
      if (events.length > 0) each(events);
    }
  }
}
