//! `clade-lab bench all`: the figures for comparisons with other VMMs, each from the bench that
//! measures it, under a stable name.

use crate::args::BenchArgs;
use crate::bench::{BenchRow, ahead, clones, disk, fork, freeze, pin, reset, restore, rollback, suspend};
use clade::Failure;
use clade_vmm::vm::Context;

/// Samples of a figure that takes a second or more.
const FEW: usize = 10;

/// The source of a figure: the row's name there, and here.
type Picks = [(&'static str, &'static str)];

const FORK: &Picks = &[
    ("pause_512M", "pause_512M"),
    ("pause_4G", "pause_4G"),
    ("pause_16G", "pause_16G"),
    ("first_instruction_512M", "first_instruction_prepared"),
    ("first_instruction_4G", "first_instruction_prepared_4G"),
    ("first_instruction_cold_512M", "first_instruction_cold"),
    ("read_shared_256M_of_512M", "read_shared"),
];
const FREEZE: &Picks = &[("pause_dirty_16k", "pause_64M_dirty")];
const RESTORE: &Picks = &[
    ("restore_api_first_byte", "restore_api_first_byte"),
    ("restore_process_first_byte", "restore_process_first_byte"),
    ("restore_next_first_instruction", "restore_next_first_instruction"),
];
const CLONES: &Picks = &[
    ("fork_api_first_instruction", "fork_api_first_instruction"),
    ("clones_100_total", "clones_100_total"),
    ("clones_1000_total", "clones_1000_total"),
    ("clones_1000_total_prepared", "clones_1000_total_prepared"),
    ("clones_growth", "clones_growth"),
    ("clone_private_kib", "clone_private_kib"),
    ("clone_kernel_kib", "clone_kernel_kib"),
];
const AHEAD: &Picks = &[("write_siblings_1000", "write_siblings")];
const PIN: &Picks = &[("pin_unpin_page", "pin_unpin_page")];
const RESET: &Picks = &[("reset_100", "reset_100"), ("reset_10000_scattered", "reset_10000_scattered")];
const ROLLBACK: &Picks = &[
    ("rollback_1000", "rollback_1000"),
    ("rollback_1000_process", "rollback_1000_process"),
    ("rollback_1000_other", "rollback_1000_other"),
];
const DISK: &Picks = &[("disk_under_forks", "disk_under_forks")];
const SUSPEND: &Picks = &[("suspend_private_kib", "suspend_private_kib"), ("wake_first_answer", "wake_first_answer")];

pub(crate) fn run(context: &Context, args: &BenchArgs) -> Result<Vec<BenchRow>, Failure> {
    let few = args.samples.min(FEW);
    let with = |mem: &[u64], samples: usize| BenchArgs { mem: mem.to_vec(), samples, ..args.clone() };
    let small = |samples| with(&[512 << 20], samples);
    let mut rows = Vec::new();
    rows.extend(picked(fork::run(context, &with(&[512 << 20, 4 << 30, 16 << 30], args.samples))?, FORK));
    rows.extend(picked(freeze::run(context.store(), &small(args.samples))?, FREEZE));
    rows.extend(picked(ahead::run(context, &with(&[64 << 20], few))?, AHEAD));
    rows.extend(picked(pin::run(context.store(), &small(args.samples))?, PIN));
    rows.extend(picked(reset::run(context, &small(args.samples))?, RESET));
    rows.extend(picked(rollback::run(&small(args.samples))?, ROLLBACK));
    rows.extend(picked(restore::restore(context, &small(few))?, RESTORE));
    rows.extend(picked(clones::run(context, &small(args.samples))?, CLONES));
    rows.extend(picked(disk::run(context, &small(args.samples))?, DISK));
    rows.extend(picked(suspend::run(context, &with(&[64 << 20], few))?, SUSPEND));
    Ok(rows)
}

/// Returns the requested rows of `rows`, under their names here. With fewer clones some do not
/// exist.
fn picked(rows: Vec<BenchRow>, picks: &Picks) -> impl Iterator<Item = BenchRow> {
    picks.iter().filter_map(move |(there, here)| {
        let row = rows.iter().find(|row| row.name == *there)?;
        Some(row.clone().called(here))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Sample;

    #[test]
    fn figures_keep_their_names_and_none_is_there_twice() {
        let all = [FORK, FREEZE, RESTORE, CLONES, AHEAD, PIN, RESET, ROLLBACK, DISK, SUSPEND].concat();
        let names: std::collections::BTreeSet<_> = all.iter().map(|(_, here)| here).collect();
        assert_eq!(names.len(), all.len());
        let rows = ["pause_4G", "other", "pause_512M"].map(|name| BenchRow::new(name, "us", &Sample::default()));
        let found: Vec<_> = picked(rows.to_vec(), FORK).map(|row| row.name).collect();
        assert_eq!(found, ["pause_512M", "pause_4G"]);
    }
}
