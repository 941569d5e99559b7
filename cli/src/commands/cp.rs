//! `clade cp`: files and directories, from and to a guest.
//!
//! The guest is not trusted: a name in its list is one entry of the written directory, or is
//! refused, and no link on this side is followed for it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, anyhow};
use bytes::Bytes;
use clade_agent_client::proto::filesystem::{EntryInfo, FileType};
use clade_agent_client::proto::{Code, RpcError};
use clade_agent_client::{Client, ClientError};
use serde::Serialize;
use tempfile::NamedTempFile;
use tokio::runtime::Handle;

use crate::commands::agent::{AgentArgs, agent_failure, block_on, keep_awake};
use crate::commands::shutdown::ShutdownSignal;
use crate::commands::{Failure, Outcome, print_json};

/// Levels of directories.
const MAX_DEPTH: usize = 128;
const PIECE: usize = 256 << 10;

#[derive(Debug, clap::Args)]
pub(crate) struct CpArgs {
    #[command(flatten)]
    agent: AgentArgs,
    /// Print the counts of copies as JSON.
    #[arg(long)]
    json: bool,
    /// VM:PATH, or a path of this host.
    #[arg(value_name = "FROM")]
    from: String,
    /// The same; one of both is in a VM. `-` is standard output.
    #[arg(value_name = "TO")]
    to: String,
}

/// The result of a copy.
#[derive(Debug, Default, Serialize)]
struct Copied {
    files: u64,
    directories: u64,
    bytes: u64,
    /// Links, devices and the like.
    left_out: Vec<String>,
}

/// Splits `VM:PATH`. A path with a slash before the colon is one of this host.
fn place(text: &str) -> Option<(&str, &str)> {
    text.split_once(':').filter(|(vm, _)| !vm.is_empty() && !vm.contains('/') && !vm.starts_with('.'))
}

fn local<T>(path: &Path, done: io::Result<T>) -> Result<T, Failure> {
    done.with_context(|| path.display().to_string()).map_err(Failure::Run)
}

/// Returns a path below a directory of the guest.
pub(super) fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

/// Returns the last name of a path of the guest.
fn last_name(path: &str) -> Result<&str, Failure> {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    if is_name(name) { Ok(name) } else { Err(Failure::input(anyhow!("{path:?} has no name to copy it under"))) }
}

/// Returns whether a guest's text is the name of an entry, and does not lead out of a directory.
fn is_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let is_one = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    is_one && !name.contains(['/', '\0']) && name != "~"
}

pub(super) async fn found(client: &Client, path: &str) -> Result<Option<EntryInfo>, Failure> {
    match client.stat(path).await {
        Ok(entry) => Ok(Some(entry)),
        Err(ClientError::Rpc(RpcError { code: Code::NotFound, .. })) => Ok(None),
        Err(error) => Err(agent_failure(error)),
    }
}

async fn up_file(client: &Client, from: &Path, to: &str, copied: &mut Copied) -> Result<(), Failure> {
    copied.bytes += send_file(client, from, to, None).await?;
    copied.files += 1;
    Ok(())
}

/// Sends a file, with its own permissions if no others are given. Returns its length.
pub(super) async fn send_file(client: &Client, from: &Path, to: &str, mode: Option<u32>) -> Result<u64, Failure> {
    let mut file = local(from, File::open(from))?;
    let own = local(from, file.metadata())?.permissions().mode() & 0o777;
    let (mut upload, call) = client.upload(to, Some(mode.unwrap_or(own)));
    let mut sent = 0;
    let mut call = std::pin::pin!(call);
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        // If it fails, the call is dropped before the upload: the agent sees no end.
        let length = local(from, (&mut file).take(PIECE as u64).read_to_end(&mut piece))?;
        if length == 0 {
            break;
        }
        tokio::select! {
            done = &mut call => {
                done.map_err(agent_failure)?;
                return Err(Failure::run(anyhow!("{to}: the agent has stopped reading")));
            }
            is_sent = upload.send(Bytes::from(piece)) => if !is_sent { break },
        }
        sent += length as u64;
    }
    drop(upload);
    call.await.map_err(agent_failure)?;
    Ok(sent)
}

async fn up(client: &Client, from: &Path, to: &str, depth: usize, copied: &mut Copied) -> Result<(), Failure> {
    let kind = local(from, fs::metadata(from))?;
    if kind.is_file() {
        return up_file(client, from, to, copied).await;
    }
    if !kind.is_dir() {
        copied.left_out.push(from.display().to_string());
        return Ok(());
    }
    if depth == MAX_DEPTH {
        return Err(Failure::run(anyhow!("{}: more than {MAX_DEPTH} levels", from.display())));
    }
    match client.make_dir(to, None).await {
        Ok(_) | Err(ClientError::Rpc(RpcError { code: Code::AlreadyExists, .. })) => {}
        Err(error) => return Err(agent_failure(error)),
    }
    copied.directories += 1;
    let mut entries: Vec<_> = local(from, fs::read_dir(from).and_then(Iterator::collect))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let is_link = local(&path, entry.file_type())?.is_symlink();
        let leads_to_file = fs::metadata(&path).is_ok_and(|target| target.is_file());
        match entry.file_name().to_str() {
            // The target of a link, if that is a file. Directories may lead in circles.
            Some(name) if !is_link || leads_to_file => {
                Box::pin(up(client, &path, &join(to, name), depth + 1, copied)).await?;
            }
            _ => copied.left_out.push(path.display().to_string()),
        }
    }
    Ok(())
}

/// Makes a file with permissions of `mode` at most, which takes the name `to` when it is complete.
pub(super) fn partial(to: &Path, mode: u32) -> Result<NamedTempFile, Failure> {
    let dir = match (to.file_name(), to.parent()) {
        (Some(_), Some(dir)) if dir.as_os_str().is_empty() => Path::new("."),
        (Some(_), Some(dir)) => dir,
        _ => return Err(Failure::input(anyhow!("invalid destination {}: it has no file name", to.display()))),
    };
    let mut builder = tempfile::Builder::new();
    local(dir, builder.prefix(".clade-").permissions(fs::Permissions::from_mode(mode)).tempfile_in(dir))
}

async fn down_bytes(client: &Client, from: &str, to: &Path, into: &mut impl Write) -> Result<u64, Failure> {
    let mut download = client.download(from).await.map_err(agent_failure)?;
    let mut length = 0;
    while let Some(piece) = download.next().await.map_err(agent_failure)? {
        local(to, into.write_all(&piece))?;
        length += piece.len() as u64;
    }
    // Standard output keeps the end of a line back, and the exit of the process drops the error of its write.
    local(to, into.flush())?;
    Ok(length)
}

/// Checks that a file may take the name `to`: a link is replaced, as a file is.
fn expect_replaceable(to: &Path) -> Result<(), Failure> {
    match fs::symlink_metadata(to) {
        Ok(found) if found.is_dir() => Err(Failure::input(anyhow!("{} is a directory", to.display()))),
        Ok(found) if !found.is_file() && !found.is_symlink() => {
            Err(Failure::input(anyhow!("{} is no file: a device or a pipe is not replaced", to.display())))
        }
        _ => Ok(()),
    }
}

async fn down_file(client: &Client, from: &str, to: &Path, mode: u32, copied: &mut Copied) -> Result<(), Failure> {
    expect_replaceable(to)?;
    let mut partial = partial(to, 0o600)?;
    copied.bytes += down_bytes(client, from, to, &mut partial).await?;
    local(to, partial.as_file().set_permissions(fs::Permissions::from_mode(mode & 0o777)))?;
    // A link of that name is replaced, not followed.
    local(to, partial.persist(to).map_err(|error| error.error))?;
    copied.files += 1;
    Ok(())
}

async fn down_dir(client: &Client, from: &str, to: &Path, depth: usize, copied: &mut Copied) -> Result<(), Failure> {
    if depth == MAX_DEPTH {
        return Err(Failure::run(anyhow!("{from}: more than {MAX_DEPTH} levels")));
    }
    match fs::symlink_metadata(to) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Err(Failure::input(anyhow!("{} is there, and no directory", to.display()))),
        Err(_) => local(to, fs::DirBuilder::new().mode(0o755).create(to))?,
    }
    copied.directories += 1;
    for entry in client.list_dir(from).await.map_err(agent_failure)? {
        if !is_name(&entry.name) {
            return Err(Failure::run(anyhow!("the guest lists an invalid file name: {:?}", entry.name)));
        }
        let (path, to) = (join(from, &entry.name), to.join(&entry.name));
        match entry.kind {
            FileType::File => down_file(client, &path, &to, entry.mode, copied).await?,
            // A link to a directory may lead in circles.
            FileType::Directory if entry.symlink_target.is_none() => {
                Box::pin(down_dir(client, &path, &to, depth + 1, copied)).await?;
            }
            _ => copied.left_out.push(path),
        }
    }
    Ok(())
}

async fn copy_up(client: &Client, from: &Path, to: &str, copied: &mut Copied) -> Result<(), Failure> {
    local(from, fs::metadata(from)).map_err(into_input)?;
    let is_dir = found(client, to).await?.is_some_and(|entry| entry.kind == FileType::Directory);
    let to = if is_dir || to.ends_with('/') || to.is_empty() {
        let real = local(from, from.canonicalize())?;
        let name = real.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Failure::input(anyhow!("{} has no name", from.display())))?;
        if to.is_empty() { name.to_owned() } else { join(to, name) }
    } else {
        to.to_owned()
    };
    up(client, from, &to, 0, copied).await
}

fn into_input(failure: Failure) -> Failure {
    match failure {
        Failure::Run(error) => Failure::Input(error),
        other => other,
    }
}

async fn copy_down(client: &Client, from: &str, to: &str, copied: &mut Copied) -> Result<(), Failure> {
    let entry = client.stat(from).await.map_err(agent_failure)?;
    if to == "-" {
        copied.bytes += down_bytes(client, from, Path::new("standard output"), &mut io::stdout()).await?;
        copied.files += 1;
        return Ok(());
    }
    let mut to = PathBuf::from(to);
    if to.is_dir() {
        to.push(last_name(if is_name(last_name(from).unwrap_or_default()) { from } else { &entry.path })?);
    }
    let leads_to_none = fs::metadata(&to).is_ok_and(|found| !found.is_file() && !found.is_dir());
    match entry.kind {
        FileType::Directory => down_dir(client, from, &to, 0, copied).await,
        // The user's own name, such as /dev/stdout.
        FileType::File if leads_to_none => Err(Failure::input(anyhow!("{} is no file", to.display()))),
        FileType::File => down_file(client, from, &to, entry.mode, copied).await,
        _ => Err(Failure::input(anyhow!("{from} is neither a file nor a directory"))),
    }
}

pub(super) fn main(args: &CpArgs) -> Outcome {
    let mut copied = Copied::default();
    let copy = async {
        match (place(&args.from), place(&args.to)) {
            (Some((vm, from)), None) => {
                let agent = args.agent.client(vm).await?;
                keep_awake(vm, copy_down(&agent, from, &args.to, &mut copied)).await
            }
            (None, Some((vm, to))) => {
                let agent = args.agent.client(vm).await?;
                keep_awake(vm, copy_up(&agent, Path::new(&args.from), to, &mut copied)).await
            }
            (Some(_), Some(_)) => Err(Failure::input(anyhow!("one of both is a path of this host"))),
            (None, None) => Err(Failure::input(anyhow!("one of both is in a VM: VM:PATH"))),
        }
    };
    block_on(async {
        // No file is made. A write to a pipe without a reader would hold a handler up.
        if args.to == "-" {
            return copy.await;
        }
        let shutdown = ShutdownSignal::listen(&Handle::current()).map_err(Failure::run)?;
        tokio::select! {
            done = copy => done,
            // A file that is not whole is removed.
            () = shutdown.wait() => Err(Failure::Signal(shutdown.signal().unwrap_or_default())),
        }
    })?;
    if args.json {
        print_json(&copied).map_err(Failure::run)?;
    }
    match copied.left_out.len() {
        0 => Ok(()),
        count => {
            let first = &copied.left_out[0];
            Err(Failure::run(anyhow!(
                "left out, as links to nothing that can be copied, or devices: {count}; {first} first"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_told_apart() {
        assert_eq!(place("web:/a:b"), Some(("web", "/a:b")));
        assert_eq!(place("web:"), Some(("web", "")));
        for own in ["./a:b", "/a:b", "a", ":a", "../a:b"] {
            assert_eq!(place(own), None, "{own}");
        }
    }

    #[test]
    fn a_guest_names_entries_and_no_ways_out() {
        for name in ["a", "a b", ".hidden", "...", "-"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "/a", "a/", "a\0", "../a", "~"] {
            assert!(!is_name(name), "{name}");
        }
        assert_eq!(last_name("/a/b/").unwrap(), "b");
        last_name("/").unwrap_err();
    }

    #[test]
    fn files_and_links_are_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink("/dev/null", at("link")).unwrap();
        for name in ["file", "link", "new"] {
            expect_replaceable(&at(name)).unwrap();
        }
        for other in [Path::new("/dev/null"), dir.path()] {
            let Err(Failure::Input(error)) = expect_replaceable(other) else { panic!("{}", other.display()) };
            assert!(error.to_string().starts_with(other.to_str().unwrap()), "{error}");
        }
        // A name of the longest kind, and one without a directory.
        drop(partial(&at(&"n".repeat(255)), 0o600).unwrap());
        assert!(partial(Path::new("/"), 0o600).is_err() && partial(&at(".."), 0o600).is_err());
    }
}
