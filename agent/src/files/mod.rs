//! `/files`: downloads and uploads.

mod download;
mod upload;
mod writing;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hyper::StatusCode;
use hyper::http::request::Parts;
use rustix::fs::OFlags;

use crate::agent::Agent;
use crate::auth::Signed;
use crate::http::{Reply, http_error, query};
use crate::paths;
use crate::users::{self, User};
pub(crate) use download::download;
pub(crate) use upload::upload;

/// The parameters of a request for a file.
#[derive(Debug)]
struct Wanted {
    user: User,
    /// As in the request, if given.
    path: Option<String>,
    workdir: Option<String>,
    /// The permissions of a new file.
    mode: Option<u32>,
}

/// Opens a regular file, which the caller has looked at. A pipe that has its place by now is refused, and a file of the
/// kernel that has no more for now, as `/proc/kmsg`, has its end there: both would block the thread for ever.
fn open_regular(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

/// A refusal: the status, and the reason.
type Refusal = (StatusCode, String);

fn bad(why: impl std::fmt::Display) -> Refusal {
    (StatusCode::BAD_REQUEST, why.to_string())
}

impl Wanted {
    fn of(agent: &Agent, head: &Parts, operation: &'static str) -> Result<Self, Refusal> {
        let of = |name: &str| query(head.uri.query(), name);
        let (path, username) = (of("path"), of("username"));
        let (signature, expires) = (of("signature"), of("signature_expiration"));
        let (token, default, workdir) = {
            let settings = agent.settings();
            (settings.token.clone(), settings.user.clone(), settings.workdir.clone())
        };
        let signed = Signed {
            path: path.as_deref().unwrap_or_default(),
            operation,
            user: username.as_deref().unwrap_or_default(),
            signature: signature.as_deref(),
            expires: expires.as_deref(),
        };
        signed.check(token.as_ref(), &head.headers).map_err(|why| (StatusCode::UNAUTHORIZED, why.to_owned()))?;
        let name = username.unwrap_or(default);
        let unknown = || (StatusCode::UNAUTHORIZED, format!("error looking up user '{name}': unknown user {name}"));
        let user = users::find_with_group(&name).ok_or_else(unknown)?;
        let octal = |text: String| u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o7777);
        let mode =
            of("mode").map(|text| octal(text).ok_or_else(|| bad("mode: an octal number is wanted"))).transpose()?;
        Ok(Self { user, path, workdir, mode })
    }

    fn resolve(&self, path: &str) -> Result<PathBuf, Refusal> {
        paths::resolve(path, &self.user, self.workdir.as_deref()).map_err(bad)
    }
}

fn refusal((status, why): Refusal) -> Reply {
    http_error(status, why)
}

/// The refusal for a file system's error.
fn failed(what: &str, path: &Path, error: &io::Error) -> Refusal {
    let status = match error.kind() {
        io::ErrorKind::NotFound => StatusCode::NOT_FOUND,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StatusCode::INSUFFICIENT_STORAGE,
        io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory => StatusCode::BAD_REQUEST,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, format!("{what} '{}': {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clade_test_support::Watchdog;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_pipe_in_the_place_of_a_file_blocks_no_thread() {
        let _watchdog = Watchdog::new(Duration::from_secs(300), || "a pipe is opened".to_owned());
        let dir = tempfile::tempdir().unwrap();
        let (pipe, file) = (dir.path().join("pipe"), dir.path().join("file"));
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        open_regular(File::options().read(true), &pipe).unwrap_err();
        open_regular(File::options().write(true), &pipe).unwrap_err();
        // With a reader, and so openable.
        let _reader = rustix::fs::open(&pipe, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        open_regular(File::options().write(true).create(true).truncate(true), &pipe).unwrap_err();
        open_regular(File::options().write(true).create(true), &file).unwrap();
        open_regular(File::options().read(true), &file).unwrap();
    }
}
