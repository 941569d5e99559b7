//! `clade snapshot`: saves a running VM, and inspects or compacts snapshots.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::anyhow;
use clade_snapshot::{Error, ParentDirs, SaveProgress, Summary, compact, show, verify};
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::args::{ActArgs, ParentsArgs, SaveArgs, SnapshotArgs, SnapshotCommand, SnapshotDirArgs};
use crate::commands::remote::{ask, supervised};
use crate::commands::units::show_pause;
use crate::commands::{Failure, Outcome, Table, print_json};
use clade_api::{SnapshotAnswer, SnapshotProgress, SnapshotRequest, WorkingSetAnswer};

/// The interval at which a snapshot's progress is polled.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

pub(crate) fn main(args: SnapshotArgs) -> Outcome {
    match (args.command, args.save) {
        (Some(SnapshotCommand::Verify(args)), _) => verify_dir(&args),
        (Some(SnapshotCommand::Show(args)), _) => show_dir(&args),
        (Some(SnapshotCommand::Compact(args)), _) => compact_dir(&args),
        (Some(SnapshotCommand::WorkingSet(args)), _) => working_set(&args),
        (None, Some(args)) => save(&args),
        (None, None) => Err(Failure::Input(anyhow!("a snapshot of which VM, in which directory?"))),
    }
}

/// Makes a bar of bytes with their rate. Hidden if standard error is not a terminal or the output
/// is JSON.
fn bar(json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{wide_bar:.cyan/blue} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

impl ParentsArgs {
    fn allowed(&self) -> ParentDirs {
        ParentDirs::beneath(self.dirs.clone())
    }
}

/// A bad snapshot is an input error; a cancelled request or a failure of the host is not.
fn failure(error: Error) -> Failure {
    match error {
        Error::Full { .. } | Error::Cancelled | Error::Memory(_) => Failure::run(error),
        _ => Failure::input(error),
    }
}

fn save(args: &SaveArgs) -> Outcome {
    let dir = std::path::absolute(&args.dir).map_err(Failure::input)?;
    let request = SnapshotRequest { dir, incremental: args.incremental, zstd: args.zstd, replace: args.replace };
    let bar = bar(args.json);
    let client = supervised(&args.name)?;
    let path = format!("/v1/vms/{}/snapshot", args.name);
    let watched = async {
        let saved = client.supervisor::<SnapshotAnswer>(Method::POST, &path, Some(&request));
        let mut saved = std::pin::pin!(saved);
        loop {
            tokio::select! {
                answer = &mut saved => return answer,
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
            // Progress is only shown. If it cannot be read, the save's answer has the reason.
            let progress = client.supervisor::<SnapshotProgress>(Method::GET, &path, None::<&()>).await;
            if let Ok(SnapshotProgress { running: true, done, total }) = progress {
                bar.set_length(total);
                bar.set_position(done);
            }
        }
    };
    let answer = ask(watched);
    bar.finish_and_clear();
    let answer = answer?;
    if answer.base_untold {
        eprintln!("warning: the base cannot be written to, and has no note that {} needs it", answer.dir.display());
    }
    if answer.base_elsewhere {
        eprintln!(
            "note: {} depends on snapshots that are not beside it: restore it with --parents and their directories",
            answer.dir.display()
        );
    }
    if args.json {
        return print_json(&answer).map_err(Failure::run);
    }
    let mib = answer.data_pages as f64 / 256.0;
    let seconds = answer.total_us / 1e6;
    println!(
        "{}: snapshot {} of {}\n{mib:.1} MiB of data and {:.1} MiB of zeros in {seconds:.2} s ({:.0} MiB/s)\n{} was paused for {}",
        answer.dir.display(),
        answer.id,
        args.name,
        answer.zero_pages as f64 / 256.0,
        mib / seconds,
        args.name,
        show_pause(answer.pause_us),
    );
    Ok(())
}

fn working_set(args: &ActArgs) -> Outcome {
    let path = format!("/v1/vms/{}/working-set", args.name);
    let answer: WorkingSetAnswer = ask(supervised(&args.name)?.supervisor(Method::POST, &path, None::<&()>))?;
    if args.json {
        return print_json(&answer).map_err(Failure::run);
    }
    println!("{} pages that {} has touched are on record", answer.pages, args.name);
    Ok(())
}

fn verify_dir(args: &SnapshotDirArgs) -> Outcome {
    let verified = verify(&args.dir, &args.parents.allowed()).map_err(failure)?;
    if args.json {
        return print_json(&verified).map_err(Failure::run);
    }
    let (dir, bytes) = (args.dir.display(), verified.bytes as f64 / f64::from(1 << 20));
    println!(
        "{dir}: {} snapshots, {} chunks in {bytes:.1} MiB, all as they were saved",
        verified.snapshots, verified.chunks
    );
    Ok(())
}

fn show_dir(args: &SnapshotDirArgs) -> Outcome {
    let summary = show(&args.dir, &args.parents.allowed()).map_err(failure)?;
    if args.json {
        return print_json(&summary).map_err(Failure::run);
    }
    print_summary(&summary).map_err(Failure::run)?;
    match summary.broken {
        Some(broken) => Err(Failure::Input(anyhow!("{}: {broken}", args.dir.display()))),
        None => Ok(()),
    }
}

fn print_summary(summary: &Summary) -> std::io::Result<()> {
    let kind =
        if summary.full { "full".to_owned() } else { format!("incremental, on {} others", summary.parents.len()) };
    println!("snapshot {}, {kind}, format {}, made on {}", summary.id, summary.version, summary.machine);
    for parent in &summary.parents {
        println!("  on {} in {}", parent.id, parent.path.display());
    }
    for (address, pages) in &summary.memory {
        println!("memory at {address:#x}: {} MiB", pages >> 8);
    }
    let mut table = Table::new(["layer", "MiB", "data pages", "zero pages", "on disk MiB", "compression"]);
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for layer in &summary.layers {
        table.row([
            layer.name.clone(),
            mib(layer.bytes),
            layer.data_pages.to_string(),
            layer.zero_pages.to_string(),
            mib(layer.disk_bytes),
            format!("{:?}", layer.compression).to_lowercase(),
        ]);
    }
    table.print()?;
    let sections: Vec<String> = summary.sections.iter().map(|(name, bytes)| format!("{name} {bytes}")).collect();
    println!("state, in bytes: {}", sections.join(", "));
    println!("what is touched first is {}on record", if summary.working_set { "" } else { "not " });
    if !summary.ignored.is_empty() {
        println!("not known to this version, and ignored: {}", summary.ignored.join(", "));
    }
    Ok(())
}

fn compact_dir(args: &SnapshotDirArgs) -> Outcome {
    let bar = bar(args.json);
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let watch = SaveProgress { progress: &progress, ..SaveProgress::none() };
    let compacted = compact(&args.dir, &args.parents.allowed(), &watch);
    bar.finish_and_clear();
    let compacted = compacted.map_err(failure)?;
    if args.json {
        return print_json(&show(&args.dir, &args.parents.allowed()).map_err(failure)?).map_err(Failure::run);
    }
    let mib = compacted.data_pages as f64 / 256.0;
    println!("{}: snapshot {} depends on no other, {mib:.1} MiB of data", args.dir.display(), compacted.id);
    Ok(())
}
