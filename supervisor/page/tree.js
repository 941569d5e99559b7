// The clade as a tree: a list of which only the rows on screen are elements. The focus stays on the
// list, which names its active row; so nothing that comes or goes takes it away.

import { byId, element, plural, setAttribute, setText, size } from "/page/dom.js";

const ROW = 24;
// VMs say how old they are within so many seconds of each other.
const ASKED_WITHIN_S = 6;

const compare = new Intl.Collator("en", { numeric: true }).compare;

// Nodes of what is there, and of parents that have ended. A VM of another generation, or that is
// younger, has its parent's name by now and is not the parent.
export function grow(vms, checkpoints) {
  const nodes = new Map(
    vms.map((vm) => [vm.name, { id: `vm:${vm.name}`, name: vm.name, kind: vm.state, vm, children: [] }]),
  );
  const ended = new Map();
  const roots = [];
  const parentOf = (name, generation, ageS) => {
    const found = nodes.get(name);
    if (found && found.vm.generation + 1 === generation && found.vm.age_s + ASKED_WITHIN_S >= ageS) return found;
    if (!ended.has(name)) {
      const ghost = { id: `ended:${name}`, name, kind: "ended", children: [] };
      ended.set(name, ghost);
      roots.push(ghost);
    }
    return ended.get(name);
  };
  for (const node of nodes.values()) {
    const { parent, generation, age_s: ageS } = node.vm;
    (parent ? parentOf(parent, generation, ageS).children : roots).push(node);
  }
  for (const one of checkpoints) {
    const node = { id: `checkpoint:${one.name}`, name: one.name, kind: "checkpoint", children: [] };
    (one.vm ? parentOf(one.vm, one.generation, one.age_s).children : roots).push(node);
  }
  const sort = (list) => {
    list.sort((one, other) => compare(one.name, other.name));
    list.forEach((node) => sort(node.children));
  };
  sort(roots);
  return roots;
}

function owned(node) {
  return node.vm?.memory ? size(node.vm.memory.private_kib) : "";
}

export class Tree {
  #list = byId("tree");
  #space = byId("tree-rows");
  #rows = [];
  #folded = new Set();
  #elements = new Map();
  #roots = [];
  #filter = "";
  #active = null;
  #typed = { text: "", at: 0 };

  constructor(onSelect) {
    this.onSelect = onSelect;
    this.#list.addEventListener("scroll", () => this.#draw());
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    this.#list.addEventListener("click", (event) => this.#click(event));
    new ResizeObserver(() => this.#draw()).observe(this.#list);
  }

  get active() {
    return this.#rows.find((row) => row.node.id === this.#active)?.node ?? null;
  }

  show(roots) {
    this.#roots = roots;
    this.#lay();
  }

  filter(text) {
    this.#filter = text.trim().toLowerCase();
    this.#lay();
    return this.#rows.length;
  }

  select(id, { scroll = true } = {}) {
    this.#active = id;
    if (scroll) this.#reveal();
    this.#draw();
    this.onSelect(this.active);
  }

  #matches(node) {
    const labels = Object.entries(node.vm?.labels ?? {}).map(([key, value]) => `${key}=${value}`);
    return [node.name, ...labels].some((text) => text.toLowerCase().includes(this.#filter));
  }

  // The rows of all that is not folded away or filtered out.
  #lay() {
    const rows = [];
    const visit = (list, level, parent) => {
      const shown = this.#filter ? list.filter((node) => this.#kept.get(node)) : list;
      shown.forEach((node, at) => {
        const row = { node, level, parent, at: at + 1, of: shown.length, index: rows.length };
        rows.push(row);
        if (node.children.length > 0 && (this.#filter || !this.#folded.has(node.id)))
          visit(node.children, level + 1, row);
      });
    };
    if (this.#filter) this.#kept = this.#keep();
    visit(this.#roots, 1, null);
    const index = this.#rows.findIndex((row) => row.node.id === this.#active);
    this.#rows = rows;
    this.#space.style.height = `${rows.length * ROW}px`;
    if (this.#active === null || !rows.some((row) => row.node.id === this.#active)) {
      // What was selected is gone: the one in its place.
      const next = rows[Math.min(Math.max(index, 0), rows.length - 1)];
      this.#active = next?.node.id ?? null;
    }
    this.#draw();
    this.onSelect(this.active);
  }

  #kept = new Map();

  #keep() {
    const kept = new Map();
    const visit = (node) => {
      const below = node.children.map(visit).some(Boolean);
      kept.set(node, below || this.#matches(node));
      return kept.get(node);
    };
    this.#roots.forEach(visit);
    return kept;
  }

  #draw() {
    const first = Math.max(0, Math.floor(this.#list.scrollTop / ROW) - 4);
    const last = Math.min(this.#rows.length, Math.ceil((this.#list.scrollTop + this.#list.clientHeight) / ROW) + 4);
    const active = this.#rows.find((row) => row.node.id === this.#active);
    const shown = this.#rows.slice(first, last);
    if (active && !shown.includes(active)) shown.push(active);
    const wanted = new Set(shown.map((row) => row.node.id));
    for (const [id, drawn] of this.#elements) {
      if (!wanted.has(id)) {
        drawn.root.remove();
        this.#elements.delete(id);
      }
    }
    shown.forEach((row) => this.#update(row));
    setAttribute(this.#list, "aria-activedescendant", active ? this.#elements.get(active.node.id).root.id : null);
  }

  #make(row) {
    const part = (className) => element("span", { className });
    const drawn = {
      fold: part("fold"),
      name: part("name"),
      state: part("state"),
      owns: part("hidden"),
      owned: part("owned"),
    };
    drawn.bars = { exclusive: part("exclusive"), shared: part("shared") };
    drawn.memory = element("span", { className: "memory" }, drawn.bars.exclusive, drawn.bars.shared);
    const parts = [drawn.fold, drawn.name, drawn.state, drawn.memory, drawn.owns, drawn.owned];
    drawn.fold.setAttribute("aria-hidden", "true");
    drawn.root = element("div", { className: "row", role: "treeitem" }, ...parts);
    drawn.root.id = `row-${encodeURIComponent(row.node.id)}`;
    drawn.root.dataset.id = row.node.id;
    this.#space.append(drawn.root);
    this.#elements.set(row.node.id, drawn);
    return drawn;
  }

  #update(row) {
    const { node, level } = row;
    const drawn = this.#elements.get(node.id) ?? this.#make(row);
    const { root } = drawn;
    const folds = node.children.length > 0;
    const isOpen = folds && (this.#filter !== "" || !this.#folded.has(node.id));
    root.style.transform = `translateY(${row.index * ROW}px)`;
    drawn.fold.style.marginInlineStart = `${(Math.min(level, 24) - 1) * 14}px`;
    setText(drawn.fold, folds ? (isOpen ? "▾" : "▸") : "");
    setText(drawn.name, node.name);
    setText(drawn.state, node.kind);
    setText(drawn.owned, owned(node));
    setAttribute(root, "data-kind", node.kind);
    setAttribute(root, "aria-level", level);
    setAttribute(root, "aria-posinset", row.at);
    setAttribute(root, "aria-setsize", row.of);
    setAttribute(root, "aria-expanded", folds ? isOpen : null);
    setAttribute(root, "aria-selected", node.id === this.#active);
    setText(drawn.owns, owned(node) && "owns ");
    const memory = node.vm?.memory;
    const pages = memory ? memory.mib * 256 : 0;
    for (const kind of ["exclusive", "shared"]) {
      const share = pages ? (100 * memory[`${kind}_pages`]) / pages : 0;
      drawn.bars[kind].style.width = `${share > 0 ? Math.max(share, 2).toFixed(1) : 0}%`;
    }
    setAttribute(drawn.memory, "data-empty", pages ? null : "");
    const [own, shared] = ["exclusive", "shared"].map((kind) => plural(memory?.[`${kind}_pages`] ?? 0, "page"));
    drawn.memory.title = memory ? `${own} its own, ${shared} shared, of ${size(memory.mib * 1024)}` : "";
  }

  #reveal() {
    const row = this.#rows.find((one) => one.node.id === this.#active);
    if (!row) return;
    const [top, height] = [row.index * ROW, this.#list.clientHeight];
    if (top < this.#list.scrollTop) this.#list.scrollTop = top;
    if (top + ROW > this.#list.scrollTop + height) this.#list.scrollTop = top + ROW - height;
  }

  #fold(row, isFolded) {
    this.#folded[isFolded ? "add" : "delete"](row.node.id);
    this.#lay();
  }

  #click(event) {
    const id = event.target.closest(".row")?.dataset.id;
    const row = this.#rows.find((one) => one.node.id === id);
    if (!row) return;
    if (event.target.closest(".fold") && row.node.children.length > 0) {
      this.#fold(row, !this.#folded.has(id));
    }
    this.select(id);
  }

  #key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || this.#rows.length === 0) return;
    const row = this.#rows.find((one) => one.node.id === this.#active) ?? this.#rows[0];
    const page = Math.max(1, Math.floor(this.#list.clientHeight / ROW) - 1);
    const isOpen = row.node.children.length > 0 && !this.#folded.has(row.node.id);
    const to = {
      ArrowDown: () => row.index + 1,
      ArrowUp: () => row.index - 1,
      PageDown: () => row.index + page,
      PageUp: () => row.index - page,
      Home: () => 0,
      End: () => this.#rows.length - 1,
      ArrowRight: () => {
        if (row.node.children.length > 0 && !isOpen) this.#fold(row, false);
        return isOpen ? row.index + 1 : row.index;
      },
      ArrowLeft: () => {
        if (isOpen && !this.#filter) this.#fold(row, true);
        else if (row.parent) return row.parent.index;
        return row.index;
      },
      Enter: () => {
        byId("vm-name").focus();
        return row.index;
      },
    }[event.key];
    const index = to ? to() : event.key.length === 1 ? this.#find(event, row.index) : null;
    if (index === null) return;
    event.preventDefault();
    this.select(this.#rows[Math.min(Math.max(index, 0), this.#rows.length - 1)].node.id);
  }

  // The next row that begins with what was just typed.
  #find(event, from) {
    const isMore = event.timeStamp - this.#typed.at < 700;
    const text = (isMore ? this.#typed.text : "") + event.key.toLowerCase();
    this.#typed = { text, at: event.timeStamp };
    const all = this.#rows.length;
    for (let step = isMore ? 0 : 1; step <= all; step += 1) {
      const row = this.#rows[(from + step) % all];
      if (row.node.name.toLowerCase().startsWith(text)) return row.index;
    }
    return null;
  }
}
