//! What docs/invariants.md says is so: every line it quotes stands in the file it names, and every test it names exists.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::{Path, PathBuf};

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if entry.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&entry, found);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            found.push(entry);
        }
    }
}

/// What stands between backquotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn every_line_and_every_test_named_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("docs/invariants.md")).unwrap();
    let mut files = Vec::new();
    sources(root, &mut files);
    let all: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let (mut rules, mut wrong) = (0, Vec::new());
    for row in text.lines().filter(|line| line.starts_with("| R")) {
        // A quoted line may hold the bar that separates cells.
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [rule, _, file, line @ .., tests] = cells.as_slice() else { panic!("not a row: {row}") };
        rules += 1;
        let line = line.join(" | ");
        if let [file] = quoted(file).as_slice() {
            let code = fs::read_to_string(root.join("memory/src").join(file)).unwrap_or_default();
            if !code.contains(quoted(&line).first().copied().unwrap_or("\0")) {
                wrong.push(format!("{rule}: {file} has no line {line}"));
            }
        }
        let named = quoted(tests).into_iter().filter(|name| !name.contains([' ', '.', ':', '…']));
        for name in named.filter(|name| !all.contains(&format!("fn {name}("))) {
            wrong.push(format!("{rule}: there is no test {name}"));
        }
    }
    assert_eq!(rules, 30, "a row for each rule");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
