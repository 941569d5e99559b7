//! Checks docs/invariants.md and docs/identity.md: every quoted line exists in the named file, and
//! every named place and test exists.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
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

/// The text between backquotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// All source code.
fn all_sources() -> String {
    let mut files = Vec::new();
    sources(root(), &mut files);
    files.iter().map(|file| fs::read_to_string(file).unwrap()).collect()
}

/// docs/identity.md names a test for each property that a clone does not share.
#[test]
fn every_row_of_what_a_clone_has_of_its_own_has_its_test() {
    let text = fs::read_to_string(root().join("docs/identity.md")).unwrap();
    let all = all_sources();
    let rows = text.lines().skip_while(|line| !line.starts_with("| what | fork")).skip(2);
    let rows: Vec<&str> = rows.take_while(|line| line.starts_with('|')).collect();
    assert!(rows.len() >= 10, "{} rows", rows.len());
    for row in rows {
        let tests = quoted(row.trim_matches('|').rsplit(" | ").next().unwrap());
        assert!(!tests.is_empty(), "no test: {row}");
        for name in tests {
            assert!(all.contains(&format!("fn {name}(")), "there is no test {name}: {row}");
        }
    }
}

#[test]
fn every_line_and_every_test_named_is_there() {
    let root = root();
    let text = fs::read_to_string(root.join("docs/invariants.md")).unwrap();
    let all = all_sources();
    let (mut rules, mut wrong) = (0, Vec::new());
    for row in text.lines().filter(|line| line.starts_with("| R")) {
        // A quoted line may contain the bar that separates cells.
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

/// The words of a text: letters, digits and underscores.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
}

/// The words that the code defines, by any keyword.
fn defined(code: &str) -> BTreeSet<&str> {
    let keywords = ["fn", "struct", "enum", "trait", "mod", "type", "const", "static"];
    words(code).zip(words(code).skip(1)).filter(|(word, _)| keywords.contains(word)).map(|(_, name)| name).collect()
}

/// Rows of three cells have a rule, the places that enforce it, and its tests. For a place `A::b`, some
/// file has the word `A` and defines `b`.
#[test]
fn every_place_and_test_of_the_rules_without_a_quoted_line_is_there() {
    let text = fs::read_to_string(root().join("docs/invariants.md")).unwrap();
    let mut files = Vec::new();
    sources(root(), &mut files);
    let codes: Vec<String> = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let known: Vec<(BTreeSet<&str>, BTreeSet<&str>)> =
        codes.iter().map(|code| (words(code).collect(), defined(code))).collect();
    let is_there = |name: &str| {
        if name.contains('/') || name.ends_with(".rs") {
            return files.iter().any(|file| file.display().to_string().contains(&format!("/{name}")));
        }
        let named: Vec<&str> = words(name).filter(|word| !word.is_empty()).collect();
        let Some((last, before)) = named.split_last() else { return false };
        known.iter().any(|(has, defines)| defines.contains(last) && before.iter().all(|word| has.contains(word)))
    };
    let (mut rules, mut places, mut wrong) = (0, 0, Vec::new());
    for (at, row) in text.lines().enumerate().filter(|(_, line)| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, enforced, tests] = cells[..] else { continue };
        let named = quoted(enforced).into_iter().chain(quoted(tests));
        wrong.extend(named.filter(|name| !is_there(name)).map(|name| format!("line {}: {name}", at + 1)));
        places += quoted(enforced).len();
        rules += 1;
    }
    assert!(rules > 50 && places > 50, "{rules} rules, {places} places");
    assert!(wrong.is_empty(), "not there: {}", wrong.join("\n"));
}
