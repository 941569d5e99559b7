//! `clade ps`: the VMs of this user.

use std::cmp::Ordering;
use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::commands::args::{ListFormat, PsArgs};
use crate::commands::remote::{ask, state_name};
use crate::commands::units::{show_age, show_size};
use crate::commands::{Failure, Outcome, print_json};
use clade_api::{Client, EndedVm, GuestState, ListedVms, VmInfo, VmState};

const NONE: &str = "-";
/// How long all VMs together may take to answer for a table.
const TABLE_LIMIT: Duration = Duration::from_millis(800);

/// Compares names, with digits in them as numbers: `web-2` before `web-10`.
pub(super) fn by_name(left: &str, right: &str) -> Ordering {
    let (mut left, mut right) = (left.as_bytes(), right.as_bytes());
    let digits = |text: &[u8]| text.iter().take_while(|b| b.is_ascii_digit()).count();
    loop {
        let (in_left, in_right) = (digits(left), digits(right));
        if in_left > 0 && in_right > 0 {
            let significant = |text: &[u8], length: usize| {
                let zeros = text[..length].iter().take_while(|b| **b == b'0').count();
                text[zeros..length].to_vec()
            };
            let (a, b) = (significant(left, in_left), significant(right, in_right));
            // The longer number is the larger; equal ones are ordered by their zeros.
            let order = a.len().cmp(&b.len()).then_with(|| a.cmp(&b)).then(in_left.cmp(&in_right));
            if order != Ordering::Equal {
                return order;
            }
            (left, right) = (&left[in_left..], &right[in_right..]);
            continue;
        }
        match (left.split_first(), right.split_first()) {
            (None, None) => return Ordering::Equal,
            (None, _) => return Ordering::Less,
            (_, None) => return Ordering::Greater,
            (Some((a, more_left)), Some((b, more_right))) if a == b => (left, right) = (more_left, more_right),
            (Some((a, _)), Some((b, _))) => return a.cmp(b),
        }
    }
}

/// Formats columns as wide as their content, two spaces apart. The result is the same on a terminal
/// and in a pipe.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| Some(row.get(column)?.chars().count())).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// A VM's memory: its own, that of the layers that it shows, and the size of its RAM.
fn memory(vm: &VmInfo) -> String {
    let show = |memory: &clade_api::MemoryInfo| {
        let (own, shared) = (show_size(memory.private_kib << 10), show_size(memory.shared_kib << 10));
        format!("{own}+{shared}/{}", show_size(memory.mib << 20))
    };
    vm.memory.as_ref().map_or_else(|| "?".into(), show)
}

/// A VM's state, or its guest's while it runs, and the errors of its disks.
fn state(vm: &VmInfo) -> String {
    let trouble = match (vm.disks.iter().any(|disk| disk.lost), vm.disks.iter().any(|disk| disk.no_room > 0)) {
        (true, _) => ", write lost",
        (_, true) => ", disk full",
        _ => "",
    };
    let state = match (vm.state, vm.guest) {
        (VmState::Running, Some(GuestState::Booting)) => "booting",
        (VmState::Running, Some(GuestState::Ready)) => "ready",
        (state, _) => state_name(state),
    };
    format!("{state}{trouble}")
}

fn or_none(text: String) -> String {
    if text.is_empty() { NONE.into() } else { text }
}

/// A line of the list.
enum VmRow<'a> {
    Running(&'a VmInfo),
    /// Its process has not answered in time.
    Silent(&'a str),
    Ended(&'a EndedVm),
}

impl VmRow<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Running(vm) => &vm.name,
            Self::Silent(name) => name,
            Self::Ended(vm) => &vm.name,
        }
    }

    fn short(&self) -> Vec<String> {
        let parent = |parent: &Option<String>| parent.clone().unwrap_or_else(|| NONE.into());
        match self {
            Self::Running(vm) => {
                vec![vm.name.clone(), state(vm), parent(&vm.parent), memory(vm), show_age(vm.age_s)]
            }
            Self::Silent(name) => {
                vec![(*name).to_owned(), "no answer".into(), "?".into(), "?".into(), "?".into()]
            }
            Self::Ended(vm) => {
                let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
                let ago = format!("{} ago", show_age(since.saturating_sub(vm.ended_at) as f64));
                vec![vm.name.clone(), "ended".into(), parent(&vm.parent), NONE.into(), ago]
            }
        }
    }

    fn wide(&self) -> Vec<String> {
        let mut row = self.short();
        row.extend(match self {
            Self::Running(vm) => {
                let nets = vm
                    .nets
                    .iter()
                    .map(|net| format!("{}/{}", if net.tap.is_empty() { "passt" } else { &net.tap }, net.mac))
                    .collect::<Vec<_>>();
                let shared = vm.memory.as_ref().map_or_else(|| "?".into(), |m| show_size(m.shared_pages << 12));
                [
                    vm.pid.to_string(),
                    vm.generation.to_string(),
                    vm.cpus.to_string(),
                    shared,
                    or_none(nets.join(",")),
                    vm.vsock.as_ref().map_or_else(|| NONE.into(), |vsock| vsock.cid.to_string()),
                    or_none(vm.labels.text()),
                ]
            }
            Self::Silent(_) => [const { "?" }; 7].map(String::from),
            Self::Ended(vm) => [
                vm.pid.to_string(),
                vm.generation.to_string(),
                NONE.into(),
                NONE.into(),
                NONE.into(),
                NONE.into(),
                NONE.into(),
            ],
        });
        row
    }
}

/// Formats the list for standard output.
fn table(running: &[VmInfo], silent: &[String], ended: &[EndedVm], all: bool, format: ListFormat) -> String {
    let silent = silent.iter().map(|name| VmRow::Silent(name));
    let rows = running.iter().map(VmRow::Running).chain(silent);
    let mut rows: Vec<VmRow<'_>> = rows.chain(ended.iter().map(VmRow::Ended)).collect();
    rows.sort_by(|a, b| by_name(a.name(), b.name()));
    let mut header: Vec<String> = ["NAME", "STATE", "PARENT", "OWN+SHARED/RAM", "AGE"].map(String::from).into();
    if format == ListFormat::Wide {
        header.extend(["PID", "GEN", "CPUS", "SHARED", "INTERFACES", "CID", "LABELS"].map(String::from));
    }
    // Last, because its length has no limit.
    header.extend(all.then(|| "REASON".to_owned()));
    let cells = |row: &VmRow<'_>| {
        let mut cells = if format == ListFormat::Wide { row.wide() } else { row.short() };
        if all {
            cells.push(match row {
                VmRow::Running(vm) => vm.stopped.as_ref().map_or_else(|| NONE.into(), ToString::to_string),
                VmRow::Silent(_) => NONE.into(),
                VmRow::Ended(vm) => vm.reason.clone(),
            });
        }
        cells
    };
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows.iter().map(cells)).collect();
    columns(&lines)
}

/// The output of `ps --all --json`.
#[derive(Serialize)]
struct Everything<'a> {
    vms: &'a [VmInfo],
    ended: &'a [EndedVm],
}

pub(super) fn main(args: &PsArgs) -> Outcome {
    let client = Client::default();
    // Ended VMs have no labels.
    let with_ended = args.all && args.filter.is_empty();
    // A person wants an answer at once, also on a host whose processors are all busy. A program wants all
    // VMs: one that is left out looks as if it had ended.
    let limit = args.wait.or((!args.json).then_some(TABLE_LIMIT));
    let (ListedVms { mut vms, forbidden, mut silent }, ended) = ask(async {
        let listed = client.list_within(limit).await?;
        Ok((listed, if with_ended { client.ended().await? } else { Vec::new() }))
    })?;
    vms.retain(|vm| args.filter.iter().all(|label| vm.labels.has(label)));
    vms.sort_by(|a, b| by_name(&a.name, &b.name));
    if !args.filter.is_empty() {
        // Their labels are not known.
        silent.clear();
    }
    match (args.json, args.all) {
        (true, false) => print_json(&vms),
        (true, true) => print_json(&Everything { vms: &vms, ended: &ended }),
        _ => io::stdout().write_all(table(&vms, &silent, &ended, args.all, args.output).as_bytes()),
    }
    .map_err(Failure::run)?;
    if forbidden > 0 {
        eprintln!("clade: {forbidden} VMs in {} are another user's", client.dir().display());
    }
    if !silent.is_empty() {
        let (count, of) = (silent.len(), silent.len() + vms.len());
        eprintln!("clade: {count} of {of} VMs have not answered in time; --wait TIME waits longer");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_are_numbers() {
        let mut names = ["web-10", "web-2", "web", "web-2-1", "a10b2", "a10b10", "web-02", "A", "9", "10", "web-"];
        names.sort_by(|a, b| by_name(a, b));
        assert_eq!(names, ["9", "10", "A", "a10b2", "a10b10", "web", "web-", "web-2", "web-2-1", "web-02", "web-10"]);
        let long = "1".repeat(48);
        assert_eq!(by_name(&long, &long), Ordering::Equal);
    }

    #[test]
    fn a_list_has_no_borders_and_fits_eighty_columns() {
        let vm = |name: &str| -> VmInfo {
            serde_json::from_value(serde_json::json!({
                "name": name, "pid": 12345, "state": "running", "parent": "web", "generation": 1, "cpus": 2,
                "age_s": 7261.0,
                "memory": {"mib": 512, "reference_pages": 1, "shared_pages": 512, "exclusive_pages": 3,
                           "pinned_pages": 0, "private_kib": 1234, "shared_kib": 2048},
            }))
            .unwrap()
        };
        let text = table(&[vm("web-10"), vm("web-2")], &[], &[], false, ListFormat::Short);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "NAME    STATE    PARENT  OWN+SHARED/RAM  AGE");
        assert_eq!(lines[1], "web-2   running  web     1.2M+2M/512M    2h1m");
        assert!(lines[2].starts_with("web-10  running"));
        let mut full = vm("web");
        full.disks =
            vec![serde_json::from_value(serde_json::json!({"path": "/d", "no_room": 3, "lost": false})).unwrap()];
        assert!(table(&[full], &[], &[], false, ListFormat::Short).contains("running, disk full"));
        let longest = table(&[vm(&"x".repeat(40))], &[], &[], false, ListFormat::Short);
        assert!(longest.lines().all(|line| line.len() <= 80), "{longest}");
        let silent = table(&[vm("web-2")], &["web-1".into()], &[], true, ListFormat::Wide);
        assert!(silent.lines().nth(1).unwrap().starts_with("web-1  no answer  ?"), "{silent}");
        let wide = table(&[vm("web-2")], &[], &[], false, ListFormat::Wide);
        assert!(wide.contains("12345") && wide.contains("2.0M") || wide.contains(" 2M "), "{wide}");
    }
}
