//! `clade stats`: the memory of VMs in numbers.

use std::io::{self, Write};
use std::time::Duration;

use clade_api::{Client, ClientError, Gathered, HistogramInfo, VmStats, pages_kib};
use serde::Serialize;

use crate::commands::ps::{by_name, columns};
use crate::commands::remote::ask;
use crate::commands::units::show_size;
use crate::commands::{Failure, Outcome, print_json};

/// Interval of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Puts the cursor at the top left, and clears from there.
const CLEAR: &str = "\x1b[H\x1b[J";

#[derive(Debug, clap::Args)]
pub(crate) struct StatsArgs {
    /// The VMs. Default: all.
    #[arg(value_name = "VM")]
    names: Vec<String>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Ask again every second, until interrupted. With JSON, a line each time.
    #[arg(long)]
    watch: bool,
}

/// The output of `--json`.
#[derive(Serialize)]
struct StatsList<'a> {
    vms: &'a [VmStats],
    /// Names of VMs that have not answered in time.
    silent: &'a [String],
}

/// Formats the bound below which at least `share` of a histogram's durations are.
fn within(histogram: &HistogramInfo, share: f64) -> String {
    if histogram.count == 0 {
        return "-".to_owned();
    }
    let mut below = 0;
    for (bound_us, count) in &histogram.buckets {
        below += count;
        if below as f64 >= share * histogram.count as f64 {
            return show_us(*bound_us);
        }
    }
    format!(">{}", histogram.buckets.last().map_or_else(String::new, |(bound, _)| show_us(*bound)))
}

fn show_us(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{:.1}ms", us as f64 / 1e3),
        _ => format!("{:.1}s", us as f64 / 1e6),
    }
}

fn row(vm: &VmStats) -> Vec<String> {
    let size = |kib: u64| show_size(kib << 10);
    let pages = |pages: u64| size(pages_kib(pages));
    let memory = &vm.memory;
    vec![
        vm.name.clone(),
        size(memory.private_kib),
        pages(memory.pages.shared),
        pages(memory.alone_pages),
        memory.layers.len().to_string(),
        vm.pins.now.to_string(),
        vm.copies.guest.to_string(),
        vm.copies.pin.to_string(),
        (vm.copies.freeze + vm.copies.freeze_pinned + vm.copies.freeze_ahead).to_string(),
        vm.pauses.fork.count.to_string(),
        within(&vm.pauses.fork, 0.99),
        vm.process.as_ref().map_or_else(|| "-".to_owned(), |process| size(process.page_tables_kib)),
    ]
}

const HEADER: [&str; 12] = [
    "NAME",
    "PRIVATE",
    "SHARED",
    "ALONE",
    "LAYERS",
    "PINS",
    "BY-GUEST",
    "BY-PIN",
    "BY-FORK",
    "FORKS",
    "PAUSE-P99",
    "TABLES",
];

fn table(gathered: &Gathered) -> String {
    let header = HEADER.map(String::from).into();
    columns(&std::iter::once(header).chain(gathered.vms.iter().map(row)).collect::<Vec<_>>())
}

/// Asks the VMs. A named VM that is missing is an error.
fn gather(names: &[String]) -> Result<Gathered, Failure> {
    let client = Client::default();
    let mut gathered = ask(async {
        for name in names {
            clade_api::check_name(name)?;
        }
        let all = if names.is_empty() { client.all_names().await? } else { names.to_vec() };
        Ok::<_, ClientError>(client.gather(all).await)
    })?;
    gathered.vms.sort_by(|one, other| by_name(&one.name, &other.name));
    let is_there = |name: &&String| gathered.vms.iter().all(|vm| vm.name != **name) && !gathered.silent.contains(*name);
    if let Some(missing) = names.iter().find(is_there) {
        let path = clade_api::socket_path(client.dir(), missing);
        return Err(Failure::input(ClientError::NoSuchVm { name: missing.clone(), path }));
    }
    Ok(gathered)
}

fn print(gathered: &Gathered, args: &StatsArgs) -> io::Result<()> {
    let Gathered { vms, silent } = gathered;
    let printed = StatsList { vms, silent };
    match (args.json, args.watch) {
        (true, true) => writeln!(io::stdout(), "{}", serde_json::to_string(&printed)?),
        (true, false) => print_json(&printed),
        (false, watch) => {
            let clear = if watch { CLEAR } else { "" };
            io::stdout().write_all(format!("{clear}{}", table(gathered)).as_bytes())
        }
    }?;
    io::stdout().flush()
}

pub(super) fn main(args: &StatsArgs) -> Outcome {
    loop {
        let gathered = gather(&args.names)?;
        print(&gathered, args).map_err(Failure::run)?;
        if !args.json && !gathered.silent.is_empty() {
            eprintln!("clade: no answer in time: {}", gathered.silent.join(", "));
        }
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_pauses_is_within_the_bound_of_its_bucket() {
        let histogram = |buckets: &[(u64, u64)], above: u64| HistogramInfo {
            count: buckets.iter().map(|(_, count)| count).sum::<u64>() + above,
            sum_us: 0,
            buckets: buckets.to_vec(),
        };
        let some = histogram(&[(512, 98), (1024, 1), (2048, 1)], 0);
        assert_eq!(
            (within(&some, 0.5), within(&some, 0.99), within(&some, 1.0)),
            ("512us".into(), "1.0ms".into(), "2.0ms".into())
        );
        assert_eq!(within(&histogram(&[], 0), 0.99), "-");
        assert_eq!(within(&histogram(&[(16, 1), (2_000_000, 0)], 9), 0.99), ">2.0s");
    }
}
