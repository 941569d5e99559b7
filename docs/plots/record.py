#!/usr/bin/env python3
"""Records a command on a terminal of 100 columns as an animated SVG: docs/plots/record.py OUT.svg COMMAND...

    docs/plots/record.py docs/plots/demo.svg target/release/clade demo

Needs pyte (`pip install pyte`), which interprets what the command writes. Waits longer than a second are cut to one.
"""

import fcntl
import html
import os
import pty
import select
import struct
import sys
import termios
import time

import pyte

COLUMNS, ROWS = 100, 30
CELL, LINE, MARGIN = 8.4, 17, 14
FRAME, LONGEST, REST = 0.12, 1.0, 4.0
COLOURS = {
    "black": "#484f58", "red": "#ff7b72", "green": "#3fb950", "brown": "#d29922", "yellow": "#d29922",
    "blue": "#58a6ff", "magenta": "#bc8cff", "cyan": "#39c5cf", "white": "#b1bac4", "default": "#e6edf3",
}


def frames(command):
    """What the screen shows, with the seconds it shows it."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    shown, since = picture(screen), time.monotonic()
    while True:
        readable, _, _ = select.select([terminal], [], [], FRAME)
        data = b""
        if readable:
            try:
                data = os.read(terminal, 65536)
            except OSError:
                pass
            if not data:
                break
            stream.feed(data)
        now = time.monotonic()
        if now - since >= FRAME and picture(screen) != shown:
            yield shown, min(now - since, LONGEST)
            shown, since = picture(screen), now
    os.waitpid(pid, 0)
    yield picture(screen), REST


def picture(screen):
    return tuple(tuple((char.data, char.fg, char.bold) for char in line(screen, y)) for y in range(ROWS))


def line(screen, y):
    cells = [screen.buffer[y][x] for x in range(COLUMNS)]
    while cells and cells[-1].data == " ":
        cells.pop()
    return cells


def spans(cells):
    out, at = [], 0
    while at < len(cells):
        end = at
        while end < len(cells) and cells[end][1:] == cells[at][1:]:
            end += 1
        text = html.escape("".join(cell[0] for cell in cells[at:end]))
        colour, bold = COLOURS.get(cells[at][1], "#" + cells[at][1]), ' font-weight="700"' if cells[at][2] else ""
        out.append(f'<tspan x="{MARGIN + at * CELL:.1f}" fill="{colour}"{bold} xml:space="preserve">{text}</tspan>')
        at = end
    return "".join(out)


def main(out, command):
    shown, total, defined, body = [], 0.0, {}, []
    for screen, seconds in frames(command):
        shown.append((screen, total, seconds))
        total += seconds
    rules = []
    for number, (screen, begin, seconds) in enumerate(shown):
        a, b = 100 * begin / total, 100 * (begin + seconds) / total
        before = f"0%, {a - 0.0001:.4f}% {{ visibility: hidden }} " if number else ""
        after = f" {b + 0.0001:.4f}%, 100% {{ visibility: hidden }}" if begin + seconds < total else ""
        rules.append(f"@keyframes f{number} {{ {before}{a:.4f}%, {b:.4f}% {{ visibility: visible }}{after} }}")
        lines = []
        for y, cells in enumerate(screen):
            if not cells:
                continue
            # A line that has been shown before, in this place, is used again.
            key = (y, cells)
            if key not in defined:
                defined[key] = f"l{len(defined)}"
            lines.append(f'<use href="#{defined[key]}"/>')
        body.append(f'<g class="f" style="animation-name:f{number}">{"".join(lines)}</g>')
    lines = [
        f'<text id="{name}" y="{MARGIN + (y + 1) * LINE - 4}">{spans(cells)}</text>' for (y, cells), name in defined.items()
    ]
    width, height = 2 * MARGIN + COLUMNS * CELL, 2 * MARGIN + ROWS * LINE
    with open(out, "w") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
            f'aria-label="{html.escape(" ".join(command))}">\n<style>\n'
            f"text {{ font: 14px ui-monospace, monospace }}\n"
            f".f {{ visibility: hidden; animation-duration: {total:.2f}s; animation-iteration-count: infinite; "
            f"animation-timing-function: step-end }}\n"
            + "\n".join(rules)
            + f'\n</style>\n<defs>{"".join(lines)}</defs>\n'
            f'<rect width="{width:.0f}" height="{height}" rx="8" fill="#0d1117"/>\n' + "\n".join(body) + "\n</svg>\n"
        )
    print(f"{out}: {len(shown)} pictures, {total:.1f} s, {os.path.getsize(out) >> 10} KiB")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
