//! The service `filesystem.Filesystem`. Like envd, it runs with the agent's rights, not the user's.
//! The user owns new entries.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clade_agent_proto::filesystem::{
    EntryInfo, EntryResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MoveRequest, PathRequest,
};
use clade_agent_proto::process::Empty;
use clade_agent_proto::{Code, RpcError};

use crate::agent::Agent;
use crate::connect::Caller;
use crate::filesystem::entry::{entry, failed};
use crate::paths;
use crate::users::{Names, User};

/// Maximum number of entries in an answer.
const MAX_ENTRIES: usize = 1 << 16;
/// Maximum depth of an answer. Each level takes room on the stack.
const MAX_DEPTH: u32 = 512;

/// Runs work that may wait for a disk on another thread.
pub(super) async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RpcError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| RpcError::internal("the request has failed"))
}

fn of_entry(entry: io::Result<EntryInfo>, path: &Path) -> Result<EntryResponse, RpcError> {
    entry.map(|entry| EntryResponse { entry }).map_err(|error| failed(path, &error))
}

/// The user of a call, and the path in it.
pub(super) fn place(agent: &Agent, caller: &Caller, path: &str) -> Result<(User, PathBuf), RpcError> {
    let user = caller.user(agent)?;
    let workdir = agent.settings().workdir.clone();
    let path = paths::resolve(path, &user, workdir.as_deref()).map_err(RpcError::invalid)?;
    Ok((user, path))
}

impl Agent {
    pub(crate) async fn stat(&self, request: PathRequest, caller: Caller) -> Result<EntryResponse, RpcError> {
        let (_, path) = place(self, &caller, &request.path)?;
        elsewhere(move || of_entry(entry(&path, &Names::read()), &path)).await?
    }

    pub(crate) async fn make_dir(&self, request: MakeDirRequest, caller: Caller) -> Result<EntryResponse, RpcError> {
        let (user, path) = place(self, &caller, &request.path)?;
        let work = move || {
            match fs::metadata(&path) {
                Ok(found) if found.is_dir() => {
                    let why = format_args!("directory already exists: {}", path.display());
                    return Err(RpcError::new(Code::AlreadyExists, why));
                }
                Ok(_) => {
                    let why = format_args!("path already exists but it is not a directory: {}", path.display());
                    return Err(RpcError::invalid(why));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path, &error)),
            }
            paths::make_dirs(&path, &user).map_err(|error| failed(&path, &error))?;
            if let Some(mode) = request.mode {
                let set = fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777));
                set.map_err(|error| failed(&path, &error))?;
            }
            of_entry(entry(&path, &Names::read()), &path)
        };
        elsewhere(work).await?
    }

    pub(crate) async fn rename(&self, request: MoveRequest, caller: Caller) -> Result<EntryResponse, RpcError> {
        let (user, from) = place(self, &caller, &request.source)?;
        let (_, to) = place(self, &caller, &request.destination)?;
        let work = move || {
            if let Some(dir) = to.parent() {
                paths::make_dirs(dir, &user).map_err(|error| failed(dir, &error))?;
            }
            fs::rename(&from, &to).map_err(|error| failed(&from, &error))?;
            of_entry(entry(&to, &Names::read()), &to)
        };
        elsewhere(work).await?
    }

    pub(crate) async fn list_dir(&self, request: ListDirRequest, caller: Caller) -> Result<ListDirResponse, RpcError> {
        let (_, path) = place(self, &caller, &request.path)?;
        let work = move || {
            let real = fs::canonicalize(&path).map_err(|error| failed(&path, &error))?;
            if !real.is_dir() {
                return Err(RpcError::invalid(format_args!("path is not a directory: {}", path.display())));
            }
            let mut entries = Vec::new();
            list(&real, &path, request.depth.clamp(1, MAX_DEPTH), &Names::read(), &mut entries)?;
            Ok(ListDirResponse { entries })
        };
        elsewhere(work).await?
    }

    pub(crate) async fn remove(&self, request: PathRequest, caller: Caller) -> Result<Empty, RpcError> {
        let (_, path) = place(self, &caller, &request.path)?;
        let work = move || {
            let removed = match fs::symlink_metadata(&path) {
                Ok(found) if found.is_dir() => {
                    if fs::canonicalize(&path).is_ok_and(|real| real == Path::new("/")) {
                        return Err(RpcError::invalid("the root directory is not removed"));
                    }
                    fs::remove_dir_all(&path)
                }
                Ok(_) => fs::remove_file(&path),
                Err(error) => Err(error),
            };
            match removed {
                // The entry does not exist, as requested.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Empty {}),
                removed => removed.map(|()| Empty {}).map_err(|error| failed(&path, &error)),
            }
        };
        elsewhere(work).await?
    }
}

/// The entries of `dir` by name, each before its own entries. `shown` is the client's path of
/// `dir`.
fn list(dir: &Path, shown: &Path, depth: u32, names: &Names, entries: &mut Vec<EntryInfo>) -> Result<(), RpcError> {
    let read = fs::read_dir(dir).and_then(|entries| entries.map(|entry| entry.map(|it| it.file_name())).collect());
    let mut found: Vec<_> = read.map_err(|error| failed(dir, &error))?;
    found.sort();
    for name in found {
        let (path, shown) = (dir.join(&name), shown.join(&name));
        let info = match entry(&path, names) {
            Ok(info) => info,
            // The entry was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path, &error)),
        };
        if entries.len() == MAX_ENTRIES {
            let why = format_args!("more than {MAX_ENTRIES} entries: list less of it at a time");
            return Err(RpcError::new(Code::ResourceExhausted, why));
        }
        entries.push(EntryInfo { path: shown.to_string_lossy().into_owned(), ..info });
        // A link to a directory is not followed.
        if depth > 1 && fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
            match list(&path, &shown, depth - 1, names, entries) {
                Err(error) if error.code == Code::NotFound => {}
                listed => listed?,
            }
        }
    }
    Ok(())
}
