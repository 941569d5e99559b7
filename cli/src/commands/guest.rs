//! `clade guest`: guests to run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::anyhow;

use crate::commands::args::GuestArgs;
use crate::commands::{Failure, Outcome, print_bytes, print_json};
use crate::linux_guest::{LinuxGuest, LinuxGuestError};

pub(super) fn main(args: &GuestArgs) -> Outcome {
    match args.guest.as_str() {
        "bare" => bare(args),
        "linux" => linux(args),
        other => Err(Failure::Input(anyhow!("there is no guest {other:?}; there are: bare, linux"))),
    }
}

fn bare(args: &GuestArgs) -> Outcome {
    let image = clade_guests::BARE_ELF;
    let path = args.output.clone().unwrap_or_else(|| PathBuf::from("bare.elf"));
    if path == Path::new("-") {
        return print_bytes(image).map_err(Failure::run);
    }
    fs::write(&path, image)
        .map_err(|error| Failure::Input(anyhow!("{} cannot be written: {error}", path.display())))?;
    eprintln!("{} bytes written to {}", image.len(), path.display());
    Ok(())
}

fn linux(args: &GuestArgs) -> Outcome {
    if let Some(path) = &args.output {
        return Err(Failure::Input(anyhow!("{}: the Linux guest stays where it is built", path.display())));
    }
    let guest = LinuxGuest::build().map_err(|error| match error {
        LinuxGuestError::Incomplete { .. } => Failure::input(error),
        _ => Failure::run(error),
    })?;
    if args.json {
        return print_json(&guest).map_err(Failure::run);
    }
    println!("--kernel {} --initrd {}", guest.kernel.display(), guest.initrd.display());
    Ok(())
}
