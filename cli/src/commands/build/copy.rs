//! `COPY`: files of the build's directory, to the guest.

use std::collections::BTreeMap;

use clade_agent_client::proto::filesystem::FileType;
use clade_oci::CopyFiles;

use super::context::{BuildContext, ContextKind, ContextSource};
use super::guest::{BuildGuest, GuestProgram};
use crate::commands::Failure;
use crate::commands::cp::{found, join, send_file};

/// Paths in one command of the guest.
const MAX_PATHS: usize = 200;

/// Carries out a `COPY` instruction.
pub(super) async fn copy(guest: &BuildGuest, context: &BuildContext, files: &CopyFiles) -> Result<(), Failure> {
    let mut sources = Vec::new();
    for word in &files.sources {
        sources.extend(context.sources(word)?);
    }
    let is_dir = files.to.ends_with('/');
    let is_there = found(guest.agent(), &files.to).await?.is_some_and(|entry| entry.kind == FileType::Directory);
    let mut made = Vec::new();
    for source in sources {
        one(guest, &source, (&files.to, is_dir || is_there), files.mode, &mut made).await?;
    }
    match &files.owner {
        Some(owner) => give(guest, owner, &made).await,
        None => Ok(()),
    }
}

/// Copies one source. The content of a directory goes to `to`, a file to its name in it, if that is
/// a directory.
async fn one(
    guest: &BuildGuest,
    source: &ContextSource,
    (to, is_dir): (&str, bool),
    mode: Option<u32>,
    made: &mut Vec<String>,
) -> Result<(), Failure> {
    let to = if is_dir && !source.is_dir { join(to, &source.name) } else { to.to_owned() };
    for entry in &source.entries {
        let to = if entry.below.is_empty() { to.clone() } else { join(&to, &entry.below) };
        match &entry.kind {
            ContextKind::Dir => {
                // An existing directory keeps its owner.
                if guest.make_dir(&to).await? {
                    made.push(to);
                }
            }
            ContextKind::File => {
                send_file(guest.agent(), &entry.path, &to, mode).await?;
                made.push(to);
            }
            ContextKind::Link(target) => {
                command(guest, &["ln", "-sfn", "--", target, &to]).await?;
                made.push(to);
            }
        }
    }
    Ok(())
}

async fn give(guest: &BuildGuest, owner: &str, made: &[String]) -> Result<(), Failure> {
    for paths in made.chunks(MAX_PATHS) {
        let words: Vec<&str> =
            ["chown", "-h", "--", owner].into_iter().chain(paths.iter().map(String::as_str)).collect();
        command(guest, &words).await?;
    }
    Ok(())
}

/// Runs a program of the guest as root.
async fn command(guest: &BuildGuest, words: &[&str]) -> Result<(), Failure> {
    let argv: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let env = BTreeMap::new();
    guest.run(GuestProgram { argv: &argv, env: &env, workdir: None, user: "root" }).await
}
