//! Checks that the lines and tests that docs/invariants.md names exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

fn sources(dir: &Path, all: &mut String) {
    for entry in fs::read_dir(dir).expect("a directory of sources") {
        let path = entry.expect("its entries").path();
        if path.is_dir() {
            sources(&path, all);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            all.push_str(&fs::read_to_string(path).expect("a source"));
        }
    }
}

#[test]
fn every_line_and_test_of_the_vcpus_rules_is_there() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(here.join("../docs/invariants.md")).unwrap();
    let mut all = String::new();
    ["src", "tests", "../vmm/src", "../api/src", "../worker/src", "../supervisor/src", "../tests/tests"]
        .iter()
        .for_each(|dir| sources(&here.join(dir), &mut all));
    let mut rules = 0;
    for row in text.lines().filter(|line| line.starts_with("| V")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [rule, _, file, line, tests] = cells[..] else { panic!("not a row: {row}") };
        let (file, line) = (quoted(file).next().unwrap(), quoted(line).next().unwrap());
        let code = fs::read_to_string(here.join("../vmm/src").join(file)).unwrap();
        assert!(code.contains(line), "{rule}: {file} has no line {line}");
        for test in quoted(tests) {
            assert!(all.contains(&format!("fn {test}(")), "{rule}: there is no test {test}");
        }
        rules += 1;
    }
    assert!(rules >= 4, "{rules} rules");
}

#[test]
fn the_readmes_fork_is_the_example_that_is_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let example = fs::read_to_string(root.join("vmm/examples/fork.rs")).unwrap();
    let (_, code) = readme.split_once("```rust\n").expect("a block of Rust");
    let (code, _) = code.split_once("```").expect("its end");
    let mut rest = example.as_str();
    for line in code.lines().map(str::trim).filter(|line| !line.is_empty()) {
        (_, rest) = rest.split_once(line).unwrap_or_else(|| panic!("the example lacks, or has elsewhere: {line}"));
    }
}

/// The words that the code defines, by any keyword.
fn defined(code: &str) -> BTreeSet<&str> {
    let keywords = ["fn", "struct", "enum", "trait", "mod", "type", "const", "static", "def"];
    let words: Vec<&str> = code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').collect();
    words.windows(2).filter(|two| keywords.contains(&two[0])).map(|two| two[1]).collect()
}

/// Rows of three cells have a rule, the places that enforce it, and its tests.
#[test]
fn every_place_and_test_of_the_rules_without_a_quoted_line_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = fs::read_to_string(root.join("docs/invariants.md")).unwrap();
    let mut all = String::new();
    let mut files = Vec::new();
    for entry in fs::read_dir(&root).unwrap() {
        let dir = entry.unwrap().path();
        for part in ["src", "tests", "client/src", "proto/src"].map(|part| dir.join(part)) {
            if part.is_dir() {
                sources(&part, &mut all);
                names(&part, &mut files);
            }
        }
    }
    let defined = defined(&all);
    let missing = |name: &str| {
        let mut words = name.split(|letter: char| !letter.is_alphanumeric() && letter != '_');
        words.find(|word| !word.is_empty() && !defined.contains(word)).map(str::to_owned)
    };
    let (mut rules, mut places) = (0, 0);
    for (at, row) in text.lines().enumerate().filter(|(_, line)| line.starts_with("| ")) {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, enforced, tests] = cells[..] else { continue };
        for place in quoted(enforced) {
            if place.contains('/') || place.ends_with(".rs") {
                let is_there = files.iter().any(|file| file.contains(&format!("/{place}")));
                assert!(is_there, "line {}: there is no file {place}", at + 1);
            } else {
                assert_eq!(missing(place), None, "line {}: {place}", at + 1);
            }
            places += 1;
        }
        for test in quoted(tests) {
            assert_eq!(missing(test), None, "line {}: {test}", at + 1);
        }
        rules += 1;
    }
    assert!(rules > 50 && places > 50, "{rules} rules, {places} places");
}

/// The paths of the sources below a directory.
fn names(dir: &Path, all: &mut Vec<String>) {
    for entry in fs::read_dir(dir).expect("a directory of sources") {
        let path = entry.expect("its entries").path();
        if path.is_dir() { names(&path, all) } else { all.push(path.display().to_string()) }
    }
}
