//! Compares the relation with TLC's graph of the specification.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;

const MOST: u32 = 2;
const PAGES: usize = 2;

type Graph = BTreeMap<String, BTreeSet<String>>;

/// A state in the format of spec/graph.py.
fn state(block: &Block, devices: u64) -> String {
    let counted = (1..=devices).map(|device| {
        let of: String = block.counted(device).iter().map(|page| (page + 1).to_string()).collect();
        format!("d{device}={}", if of.is_empty() { "-" } else { &of })
    });
    format!("{block} {}", counted.collect::<Vec<_>>().join(" "))
}

fn name(step: Step) -> String {
    let page = |name: &str, page: usize| format!("{name} {}", page + 1);
    match step {
        Step::PinBlock(d) => format!("PinBlock d{d}"),
        Step::PinPage(p, d) => format!("PinPage {} d{d}", p + 1),
        Step::UnpinBlock(d) => format!("UnpinBlock d{d}"),
        Step::UnpinPage(p, d) => format!("UnpinPage {} d{d}", p + 1),
        Step::Lock(_) => "Lock".into(),
        Step::SetPage(p) => page("SetPage", p),
        Step::OpenPage(p) => page("OpenPage", p),
        Step::SharePage(p) => page("SharePage", p),
        Step::ClosePage(p) => page("ClosePage", p),
        Step::ReopenPage(p) => page("ReopenPage", p),
        Step::Own(p) => page("Own", p),
        Step::Take(p) => page("Take", p),
        Step::Unlock | Step::SetBlock | Step::Split | Step::ShareBlock | Step::Merge => format!("{step:?}"),
    }
}

fn steps(devices: u64) -> Vec<Step> {
    let mut steps = vec![Step::Unlock, Step::SetBlock, Step::Split, Step::ShareBlock, Step::Merge];
    steps.push(Step::Lock(Lock::Change));
    for device in 1..=devices {
        steps.extend([Step::PinBlock(device), Step::UnpinBlock(device), Step::Lock(Lock::Pin(device))]);
        steps.extend((0..PAGES).flat_map(|page| [Step::PinPage(page, device), Step::UnpinPage(page, device)]));
    }
    for page in 0..PAGES {
        steps.extend([Step::SetPage(page), Step::OpenPage(page), Step::SharePage(page), Step::ClosePage(page)]);
        steps.extend([Step::ReopenPage(page), Step::Own(page), Step::Take(page)]);
    }
    steps
}

/// All reachable states and steps of the relation.
fn reached(devices: u64) -> Graph {
    let all = steps(devices);
    let mut graph = Graph::new();
    let mut todo = VecDeque::from([Block::new(PAGES, true, true)]);
    while let Some(block) = todo.pop_front() {
        let from = state(&block, devices);
        if graph.contains_key(&from) {
            continue;
        }
        let out = graph.entry(from).or_default();
        for step in &all {
            let mut next = block.clone();
            if next.step(*step, MOST).is_ok() {
                out.insert(format!("{} => {}", name(*step), state(&next, devices)));
                todo.push_back(next);
            }
        }
    }
    graph
}

fn read(text: &str) -> Graph {
    let line = |line: &str| {
        let mut parts = line.split(" | ").map(str::to_owned);
        (parts.next().unwrap(), parts.collect())
    };
    text.lines().filter(|l| !l.starts_with('#')).map(line).collect()
}

fn missing(of: &Graph, in_: &Graph) -> Vec<String> {
    let none = BTreeSet::new();
    let steps = of.iter().flat_map(|(state, steps)| {
        let there = in_.get(state).unwrap_or(&none);
        steps.difference(there).map(move |step| format!("{state}: {step}"))
    });
    steps.collect()
}

#[test]
fn the_relation_is_the_specifications() {
    let (spec, ours) = (read(include_str!("../../../../spec/Ownership.graph")), reached(1));
    let (less, more) = (missing(&spec, &ours), missing(&ours, &spec));
    println!("{} states, {} steps", ours.len(), ours.values().map(BTreeSet::len).sum::<usize>());
    assert!(less.is_empty(), "refused, though the specification allows it: {less:#?}");
    assert!(more.is_empty(), "allowed, though the specification does not: {more:#?}");
    assert_eq!(spec.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
}

/// Two devices, in a configuration too small to reach all states of the relation: every step of the
/// specification there is allowed.
#[test]
fn what_two_devices_do_in_the_specification_is_allowed() {
    let (spec, ours) = (read(include_str!("../../../../spec/Ownership-two.graph")), reached(2));
    let less = missing(&spec, &ours);
    assert!(less.is_empty(), "refused, though the specification allows it: {less:#?}");
    println!("{} states of the specification's, {} of the relation's", spec.len(), ours.len());
}
