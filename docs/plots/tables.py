#!/usr/bin/env python3
"""Tables of docs/performance.md, from the JSON of one sitting: docs/plots/tables.py DIR, where DIR is what
docs/plots/sitting.sh has written. Prints Markdown. A figure without a row in the sitting is printed as "-"."""

import json
import pathlib
import sys

# Text, figures of ours (joined by " / "), and text of the baseline where the page has one.
BASELINE = [
    ("parent's pause at a fork, 512 MiB", ["pause_512M"], "copying all RAM"),
    ("the same, 4 GiB / 16 GiB", ["pause_4G", "pause_16G"], ""),
    ("the first fork in a VM's life, 512 MiB / 4 GiB / 16 GiB",
     ["first_fork_pause_512M", "first_fork_pause_4G", "first_fork_pause_16G"], None),
    ("fork to the child's first instruction, 512 MiB", ["first_instruction_512M"],
     "a cold VM on a private file in 4 KiB pages"),
    ("the same, 4 GiB / 16 GiB", ["first_instruction_4G", "first_instruction_16G"], ""),
    ("the same, 512 MiB, in a VM that is made on the path", ["first_instruction_cold_512M"], ""),
    ("a child reads 256 MiB of its parent's memory", ["read_shared_256M_of_512M"], ""),
    ("a reset after 100 / 10,000 pages written, to the first instruction", ["reset_100", "reset_10000"],
     "another, prepared VM"),
    ("a rollback after 1,000 pages written, in the VM's process / by the API",
     ["rollback_1000_process", "rollback_1000"], "another VM of the checkpoint, prepared"),
    ("a snapshot's directory to the first instruction, 512 MiB", ["restore_first_instruction"],
     "reading all of it from the disk first"),
    ("the same, of the next VM from it", ["restore_next_first_instruction"], "the first"),
    ("saving 256 MiB while the VM runs", ["save_full"], "writing as much past the page cache"),
    ("disk reads of a guest that is forked 100 times a second", ["disk_under_forks"], "not forked"),
    ("pin and unpin one exclusive page", ["pin_unpin_page"], "a mutex and counts, uncontended"),
    ("a short read pin of a shared page", ["read_pin_shared_page"], "the same"),
]
LIMIT = [
    ("parent's pause, 512 MiB", ["pause_512M"], "park, save, copy the hot set"),
    ("the same, 4 GiB", ["pause_4G"], ""),
    ("fork to the first instruction, 512 MiB", ["first_instruction_512M"], "park, map, run"),
    ("the same, 4 GiB", ["first_instruction_4G"], ""),
    ("the same, 512 MiB, in a VM that is made on the path", ["first_instruction_cold_512M"], ""),
    ("a child reads 256 MiB of its parent's memory", ["read_shared_256M_of_512M"], "pages that it has mapped"),
    ("pause of the memory with 4 / 64 / 256 MiB dirty", ["pause_dirty_1k", "pause_dirty_16k", "pause_dirty_64k"],
     "one `mprotect`"),
    ("a reset after 10 / 100 / 1,000 / 10,000 pages", ["reset_10", "reset_100", "reset_1000", "reset_10000"],
     "park, discard or copy, run"),
    ("the same, 1,000 / 10,000 pages far apart", ["reset_1000_scattered", "reset_10000_scattered"], ""),
    ("a rollback after 1,000 pages, in the VM's process / by the API",
     ["rollback_1000_process", "rollback_1000"], ""),
    ("a snapshot's directory to the first instruction", ["restore_first_instruction"],
     "make a VM of a mapped file, run"),
    ("the next VM from it", ["restore_next_first_instruction"], "map, run"),
    ("a restore by the API", ["restore_api_first_byte"], "a prepared process, map, run"),
    ("a process that restores a snapshot", ["restore_process_first_byte"], "a process by fork, make a VM, run"),
    ("a wake to the first answer", ["wake_first_answer"], "map a file, run"),
    ("a wake and 1,000 pages written", ["wake_answer_of_1000_pages"], "of a VM that is awake"),
    ("1,000 pages that siblings wrote, copied ahead", ["write_siblings_1000"], "pages that the child owns"),
    ("pin and unpin one exclusive page", ["pin_unpin_page"], "a mutex and counts, uncontended"),
    ("one fork by the API to the first instruction", ["fork_api_first_instruction"], "a prepared process, map, run"),
    ("100 clones by the API, cold / prepared", ["clones_100_total", "clones_100_total_prepared"],
     "processes by fork"),
    ("300 clones, cold / prepared", ["clones_300_total", "clones_300_total_prepared"], ""),
    ("1,000 clones, cold / prepared", ["clones_1000_total", "clones_1000_total_prepared"], ""),
    ("1,000 children that write 256 KiB and answer, cold / prepared",
     ["live_1000_answers", "live_1000_answers_prepared"], "processes by fork that write as much"),
]
PARTS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def value(figure, unit):
    """A figure with two or three digits, and the unit that fits."""
    if unit not in PARTS:
        return f"{figure:.0f} {unit}"
    seconds = figure * PARTS[unit]
    name, part = next((name, part) for name, part in reversed(PARTS.items()) if seconds >= part or name == "ns")
    scaled = seconds / part
    return f"{scaled:.{2 if scaled < 2 else 1 if scaled < 10 else 0}f} {name}"


def joined(values):
    """Several values, with the unit once if it is the same."""
    units = {text.rsplit(" ", 1)[-1] for text in values}
    if len(units) == 1 and len(values) > 1:
        return " / ".join(text.rsplit(" ", 1)[0] for text in values) + " " + units.pop()
    return " / ".join(values)


def ours(rows):
    values = [value(row["ours"]["p50"], row["unit"]) for row in rows]
    tail = rows[0]["ours"]["p99"]
    if len(rows) == 1 and rows[0]["unit"] in PARTS:
        figure, unit = value(tail, rows[0]["unit"]).rsplit(" ", 1)
        return f"{values[0]} ({figure if values[0].endswith(' ' + unit) else f'{figure} {unit}'})"
    return joined(values)


def beside(rows, key, note):
    """The baselines or limits of rows, once if they are the same, and what they are. Without a note: nothing."""
    if note is None:
        return ""
    values = [value(row[key]["p50"], row["unit"]) if row[key] else "-" for row in rows]
    return (values[0] if len(set(values)) == 1 else joined(values)) + (f": {note}" if note else "")


def ratios(rows):
    return " / ".join(f"{row['ratio']:.1f}" if row["ratio"] else "-" for row in rows)


def table(head, entries, found, cells_of):
    print("|", " | ".join(["", *head]).strip(), "|")
    print("|---" * (len(head) + 1) + "|")
    for text, names, note in entries:
        rows = [found[name] for name in names if name in found]
        cells = cells_of(rows, note) if len(rows) == len(names) else ["-"] * len(head)
        print("|", " | ".join([text, *cells]), "|")


def main():
    found = {}
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
        # Those with a dash measure rows of other files once more, in another way.
        if "-" not in path.stem:
            found.update((row["name"], row) for row in json.loads(path.read_text()).get("rows", []))
    table(["ours, p50 (p99)", "baseline"], BASELINE, found,
          lambda rows, note: [ours(rows), beside(rows, "baseline", note)])
    print()
    table(["ours, p50 (p99)", "limit", "ratio"], LIMIT, found,
          lambda rows, note: [ours(rows), beside(rows, "limit", note), ratios(rows)])


main()
