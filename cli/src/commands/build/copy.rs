//! `COPY`: files of the build's directory, to the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::anyhow;
use clade_agent_client::proto::filesystem::FileType;
use clade_oci::CopyFiles;

use super::context::{BuildContext, ContextKind, ContextSource, named};
use super::guest::{BuildGuest, GuestProgram};
use crate::commands::Failure;
use crate::commands::agent::agent_failure;
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
    let mut copied = CopiedEntries::default();
    if files.owner.is_some() {
        copied.made = missing_dirs(guest, &files.to).await?;
    }
    for source in sources {
        one(guest, &source, (&files.to, is_dir || is_there), files.mode, &mut copied).await?;
    }
    let Some(owner) = &files.owner else { return Ok(()) };
    of_all(guest, &["chown", "-h", "--", &with_group(owner)], &copied.made).await?;
    // Another owner clears these bits of a program.
    for (mode, paths) in &copied.programs {
        of_all(guest, &["chmod", "--", &format!("{mode:04o}")], paths).await?;
    }
    Ok(())
}

/// The directories that are made on the way to a path.
async fn missing_dirs(guest: &BuildGuest, to: &str) -> Result<Vec<String>, Failure> {
    let mut missing = Vec::new();
    let own = Path::new(to).ancestors().skip(usize::from(!to.ends_with('/')));
    for dir in own.filter_map(Path::to_str) {
        if found(guest.agent(), dir).await?.is_some() {
            break;
        }
        missing.push(dir.to_owned());
    }
    Ok(missing)
}

/// An owner with a group, as Docker has it: a user's own, or that of the user's number.
fn with_group(owner: &str) -> String {
    let is_number = !owner.is_empty() && owner.bytes().all(|byte| byte.is_ascii_digit());
    match owner {
        both if both.contains(':') => both.to_owned(),
        number if is_number => format!("{number}:{number}"),
        name => format!("{name}:"),
    }
}

/// Entries of the guest that an instruction has made.
#[derive(Debug, Default)]
struct CopiedEntries {
    made: Vec<String>,
    /// New directories, in which nothing can be written through: they have no links.
    dirs: BTreeSet<String>,
    /// Files that run with their owner's or group's rights, by their permissions.
    programs: BTreeMap<u32, Vec<String>>,
}

impl CopiedEntries {
    /// Whether there is neither a file of the image nor a link at this path.
    fn is_new(&self, path: &str) -> bool {
        path.rsplit_once('/').is_some_and(|(dir, _)| self.dirs.contains(dir))
    }

    /// Notes a link: a later source may have a file of its name.
    fn link(&mut self, path: String) {
        if let Some((dir, _)) = path.rsplit_once('/') {
            self.dirs.remove(dir);
        }
        self.made.push(path);
    }
}

/// Copies one source. The content of a directory goes to `to`, a file to its name in it, if that is
/// a directory.
async fn one(
    guest: &BuildGuest,
    source: &ContextSource,
    (to, is_dir): (&str, bool),
    mode: Option<u32>,
    copied: &mut CopiedEntries,
) -> Result<(), Failure> {
    let to = if is_dir && !source.is_dir { join(to, &source.name) } else { to.to_owned() };
    for entry in &source.entries {
        let to = if entry.below.is_empty() { to.clone() } else { join(&to, &entry.below) };
        match &entry.kind {
            ContextKind::Dir => {
                // An existing directory keeps its owner and its permissions.
                if guest.make_dir(&to, Some(permissions(mode, &entry.path)?)).await? {
                    copied.dirs.insert(to.trim_end_matches('/').to_owned());
                    copied.made.push(to);
                }
            }
            ContextKind::File => {
                let is_direct = entry.below.is_empty() && !is_dir;
                if !copied.is_new(&to) {
                    make_way(guest, &to, is_direct).await?;
                }
                let mode = permissions(mode, &entry.path)?;
                send_file(guest.agent(), &entry.path, &to, Some(mode)).await?;
                if mode & 0o6000 != 0 {
                    copied.programs.entry(mode).or_default().push(to.clone());
                }
                copied.made.push(to);
            }
            ContextKind::Link(target) => {
                if !copied.is_new(&to) && is_directory(guest, &to).await? {
                    let link = entry.path.display();
                    return Err(Failure::input(anyhow!("{to} is a directory, which {link}, a link, cannot replace")));
                }
                command(guest, &["ln", "-sfn", "--", target, &to]).await?;
                copied.link(to);
            }
        }
    }
    Ok(())
}

/// The permissions of a copy: those given, or those of the file of the host.
fn permissions(given: Option<u32>, path: &Path) -> Result<u32, Failure> {
    let own = || Ok(fs::symlink_metadata(path).map_err(named(path))?.permissions().mode() & 0o7777);
    given.map_or_else(own, Ok)
}

/// Removes the file that a new one replaces: the agent would write into it, and so into its other hard links
/// and through a symbolic link. A link that `COPY` names itself (`is_direct`) is followed.
async fn make_way(guest: &BuildGuest, to: &str, is_direct: bool) -> Result<(), Failure> {
    let Some(there) = found(guest.agent(), to).await? else { return Ok(()) };
    let is_link = there.symlink_target.is_some();
    let is_replaced = if is_link { !is_direct } else { there.kind != FileType::Directory };
    if is_replaced { guest.agent().remove(to).await.map_err(agent_failure) } else { Ok(()) }
}

/// Whether a directory is there, and no link to one: `ln` would make a link in it.
async fn is_directory(guest: &BuildGuest, path: &str) -> Result<bool, Failure> {
    let there = found(guest.agent(), path).await?;
    Ok(there.is_some_and(|there| there.kind == FileType::Directory && there.symlink_target.is_none()))
}

/// Runs a program of the guest with the paths behind its own arguments.
async fn of_all(guest: &BuildGuest, program: &[&str], paths: &[String]) -> Result<(), Failure> {
    for some in paths.chunks(MAX_PATHS) {
        let words: Vec<&str> = program.iter().copied().chain(some.iter().map(String::as_str)).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_has_a_group() {
        let all = [("7", "7:7"), ("app", "app:"), ("7:20", "7:20"), ("app:staff", "app:staff"), ("a7", "a7:")];
        all.into_iter().for_each(|(given, owner)| assert_eq!(with_group(given), owner));
    }

    #[test]
    fn a_file_in_a_new_directory_is_new_unless_a_link_is_there() {
        let dirs = ["/a", "/a/b"].map(str::to_owned).into();
        let mut copied = CopiedEntries { dirs, ..CopiedEntries::default() };
        assert!(copied.is_new("/a/x") && copied.is_new("/a/b/x") && !copied.is_new("/x") && !copied.is_new("/c/x"));
        copied.link("/a/b/x".to_owned());
        assert!(copied.is_new("/a/x") && !copied.is_new("/a/b/x"));
        assert_eq!(copied.made, ["/a/b/x"]);
    }
}
