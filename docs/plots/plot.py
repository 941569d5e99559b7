#!/usr/bin/env python3
"""Plots of the benches, as SVG: docs/plots/plot.py BENCH.json... writes beside itself what the files have rows for.

    clade-lab bench fork --mem 512M,1G,2G,4G --json >fork.json
    clade-lab bench freeze --json >freeze.json
    clade-lab bench reset --json >reset.json
    clade-lab bench clones --count 1000 --json >clones.json
    docs/plots/plot.py fork.json freeze.json reset.json clones.json

Each plot has ours, the limit and the baseline of the same run, p50 as a line and p99 as a whisker, on two
logarithmic axes.
"""

import json
import math
import pathlib
import re
import sys

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 40, 48, 52
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #57606a }
  .title { font-size: 15px; font-weight: 600; fill: #24292f }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .ours { stroke: #0969da; fill: #0969da } .baseline { stroke: #9a6700; fill: #9a6700 }
  .limit { stroke: #1a7f37; fill: #1a7f37 }
  .line { fill: none; stroke-width: 2 } text.ours, text.baseline, text.limit { stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #8b949e } .title { fill: #e6edf3 } .grid { stroke: #30363d }
    .ours { stroke: #58a6ff; fill: #58a6ff } .baseline { stroke: #d29922; fill: #d29922 } .limit { stroke: #3fb950; fill: #3fb950 }
    .line { fill: none }
  }
"""

SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text):
    return int(text[:-1]) * SIZES[text[-1]]


def bytes_of(value):
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g}"


def time_of(us):
    for unit, name in ((1e6, "s"), (1e3, "ms"), (1, "µs")):
        if us >= unit:
            return f"{us / unit:g} {name}"
    return f"{us * 1e3:g} ns"


def pages(text):
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


# What is plotted: rows by name, the x of a row, titles.
PLOTS = {
    "pause-ram": (r"pause_(\d+[MG])$", size, bytes_of, "Parent's pause at a fork, by guest RAM", "a full copy"),
    "pause-dirty": (
        r"pause_dirty_(\d+k?)$",
        lambda text: pages(text) * 4096,
        bytes_of,
        "Pause at a fork, by memory written since the last one",
        "copied at once",
    ),
    "clones": (
        r"clones_(\d+)_total$",
        int,
        lambda n: f"{n:g}",
        "Clones until the last one's first instruction, by their number",
        "VMs in one process",
    ),
    "reset": (r"reset_(\d+)$", int, lambda n: f"{n:g}", "Reset of a running VM, by pages written", "another VM from the image"),
}


def ticks(low, high, step):
    at = step ** math.floor(math.log(low, step))
    while at <= high * 1.0001:
        if at >= low * 0.9999:
            yield at
        at *= step


def draw(title, label_x, baseline, points):
    xs = [x for x, _ in points]
    ys = [side[key] for _, sides in points for side in sides.values() for key in ("p50", "p99")]
    low_x, high_x = min(xs), max(xs)
    low_y, high_y = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))

    def px(x):
        span = math.log(high_x / low_x) or 1
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(x / low_x) / span

    def py(y):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(y / low_y) / math.log(high_y / low_y)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="{LEFT}" y="22">{title}</text>',
        f'<text class="ours" x="{LEFT}" y="40">Clade</text>',
        f'<text class="limit" x="{LEFT + 60}" y="40">the kernel calls alone</text>',
        f'<text class="baseline" x="{LEFT + 220}" y="40">{baseline}</text>',
    ]
    for y in ticks(low_y, high_y, 10):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{time_of(y)}</text>')
    for x in xs:
        out.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label_x(x)}</text>')
    for name in ("baseline", "limit", "ours"):
        line = " ".join(f"{px(x):.1f},{py(sides[name]['p50']):.1f}" for x, sides in points if name in sides)
        out.append(f'<polyline class="line {name}" points="{line}"/>')
        for x, sides in points:
            if name not in sides:
                continue
            x, value = px(x), sides[name]
            out.append(f'<circle class="{name}" cx="{x:.1f}" cy="{py(value["p50"]):.1f}" r="3"/>')
            ends = f'y1="{py(value["p50"]):.1f}" y2="{py(value["p99"]):.1f}"'
            out.append(f'<line class="{name}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
    out.append(f'<text x="{LEFT}" y="{HEIGHT - 10}">p50, and p99 as a whisker; one run on one host</text>')
    out.append("</svg>\n")
    return "\n".join(out)


def main(paths):
    rows = [row for path in paths for row in json.loads(pathlib.Path(path).read_text())["rows"]]
    factor = {"us": 1, "ms": 1e3, "ns": 1e-3, "s": 1e6}
    for name, (pattern, x_of, label_x, title, baseline) in PLOTS.items():
        points = []
        for row in rows:
            match = re.match(pattern, row["name"])
            if match and x_of(match[1]) > 0 and row["unit"] in factor:
                side = lambda which: {key: row[which][key] * factor[row["unit"]] for key in ("p50", "p99")}
                points.append((x_of(match[1]), {which: side(which) for which in ("ours", "limit", "baseline") if row.get(which)}))
        if len(points) < 2:
            continue
        path = pathlib.Path(__file__).with_name(f"{name}.svg")
        path.write_text(draw(title, label_x, baseline, sorted(points, key=lambda point: point[0])))
        print(path.name, len(points), "points")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
