//! Checks that the lines and tests that docs/invariants.md names exist.

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
