//! `clade disk`: the journal that a VM has left beside a disk's image.

use std::path::Path;

use clade_block::{DiskError, DiskJournal, JournalState};
use serde::Serialize;

use crate::commands::args::{DiskCommand, DiskImageArgs};
use crate::commands::{Failure, Outcome, print_json};

/// The output of `clade disk show --json`.
#[derive(Debug, Serialize)]
struct JournalInfo {
    image: String,
    journal: String,
    id: Option<String>,
    state: &'static str,
    reason: Option<String>,
    data_bytes: u64,
    zero_bytes: u64,
    overlays: usize,
    overlay_bytes_on_disk: u64,
}

/// The output of `clade disk apply --json` and `clade disk discard --json`.
#[derive(Debug, Serialize)]
struct JournalOutcome {
    image: String,
    copied_bytes: u64,
    zeroed_bytes: u64,
    discarded: bool,
}

pub(crate) fn main(command: &DiskCommand) -> Outcome {
    match command {
        DiskCommand::Show(args) => show(args),
        DiskCommand::Apply(args) => apply(args),
        DiskCommand::Discard(args) => discard(args),
    }
}

/// Only a missing file makes an I/O error an input error.
fn failure(error: DiskError) -> Failure {
    match &error {
        DiskError::File(file) if file.source.kind() != std::io::ErrorKind::NotFound => Failure::run(error),
        _ => Failure::input(error),
    }
}

fn state_text(state: &JournalState) -> (&'static str, Option<String>) {
    match state {
        JournalState::None => ("none", None),
        JournalState::Good => ("good", None),
        JournalState::Applying => ("applying", None),
        JournalState::Missing => ("missing", None),
        JournalState::Refused(error) => ("refused", Some(clade_vmm::error_chain(error))),
    }
}

fn show(args: &DiskImageArgs) -> Outcome {
    let found = DiskJournal::show(&args.image).map_err(failure)?;
    let (state, reason) = state_text(&found.state);
    let shown = JournalInfo {
        image: found.image.display().to_string(),
        journal: found.journal.display().to_string(),
        id: found.id.map(|id| id.to_string()),
        state,
        reason,
        data_bytes: found.data,
        zero_bytes: found.zeros,
        overlays: found.overlays,
        overlay_bytes_on_disk: found.room,
    };
    if args.json {
        return print_json(&shown).map_err(Failure::run);
    }
    let JournalInfo { image, journal, data_bytes, zero_bytes, overlays, overlay_bytes_on_disk, .. } = &shown;
    let holds = format!(
        "{data_bytes} bytes in {overlays} overlays that take {overlay_bytes_on_disk} bytes, {zero_bytes} bytes of zeros"
    );
    let way_out = format!("clade disk apply {image}, or clade disk discard {image}");
    match &found.state {
        JournalState::None => println!("{image}: no journal"),
        JournalState::Good => println!("{journal}: {holds}\nit is put into {image} when that is opened next"),
        JournalState::Applying => {
            println!("{journal}: {holds}\nputting it into {image} goes on when that is opened next");
        }
        JournalState::Missing => {
            let id = shown.id.as_deref().unwrap_or("unknown");
            println!(
                "{image}: its journal of id {id} is not at {journal}\nput it there, or: clade disk discard {image}"
            );
        }
        JournalState::Refused(_) => {
            let reason = shown.reason.as_deref().unwrap_or_default();
            println!("{journal}: {holds}\nit is not used: {reason}\n{way_out}");
        }
    }
    Ok(())
}

fn told(image: &Path, json: bool, text: &str, (copied_bytes, zeroed_bytes, discarded): (u64, u64, bool)) -> Outcome {
    if json {
        let image = image.display().to_string();
        return print_json(&JournalOutcome { image, copied_bytes, zeroed_bytes, discarded }).map_err(Failure::run);
    }
    println!("{}: {text}", image.display());
    Ok(())
}

fn apply(args: &DiskImageArgs) -> Outcome {
    let report = DiskJournal::apply(&args.image).map_err(failure)?;
    let text = format!("given {} bytes and {} bytes of zeros; the journal is gone", report.copied, report.zeroed);
    told(&args.image, args.json, &text, (report.copied, report.zeroed, false))
}

fn discard(args: &DiskImageArgs) -> Outcome {
    let discarded = DiskJournal::discard(&args.image).map_err(failure)?;
    let text = if discarded { "the journal is thrown away; the image is as it was" } else { "no journal" };
    told(&args.image, args.json, text, (0, 0, discarded))
}
