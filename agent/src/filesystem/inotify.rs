//! Events in a directory, from the kernel's inotify.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clade_agent_proto::filesystem::EventType;
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};
use rustix::io::Errno;
use tokio::io::Interest;

use super::watchers::MAX_EVENTS;
use crate::stream::{Stream, register};

/// Maximum number of directories of a watch.
const MAX_DIRS: usize = 8192;
/// Bytes of events read at a time: some hundred events.
const BUFFER: usize = 16 << 10;

/// One event: the type, and the path below the watched directory.
pub(crate) type Event = (EventType, PathBuf);

/// A watch of a directory.
#[derive(Debug)]
pub(crate) struct Inotify {
    fd: Stream,
    root: PathBuf,
    is_recursive: bool,
    /// Paths of the directories below the root.
    dirs: HashMap<i32, PathBuf>,
}

fn flags() -> WatchFlags {
    WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MODIFY
        | WatchFlags::ATTRIB
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR
}

impl Inotify {
    /// Makes a watch of `root`, without a directory. Must be called on the runtime's thread.
    pub(crate) fn new(root: &Path, is_recursive: bool) -> io::Result<Self> {
        let fd = init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let fd = register(fd, Interest::READABLE)?;
        Ok(Self { fd, root: root.to_owned(), is_recursive, dirs: HashMap::new() })
    }

    /// Watches its root, which may take long, without events for its entries.
    pub(crate) fn begin(mut self) -> io::Result<Self> {
        self.add(Path::new(""), None)?;
        Ok(self)
    }

    /// Watches a directory, and those in it for a recursive watch. Adds their entries to `found`.
    fn add(&mut self, dir: &Path, mut found: Option<&mut Vec<Event>>) -> io::Result<()> {
        if self.dirs.len() >= MAX_DIRS {
            return Err(io::Error::other(format!("more than {MAX_DIRS} directories")));
        }
        let path = self.root.join(dir);
        let id = add_watch(self.fd.get_ref(), &path, flags())?;
        self.dirs.insert(id, dir.to_owned());
        if !self.is_recursive {
            return Ok(());
        }
        // After the watch, so that later entries cause events.
        for entry in fs::read_dir(&path)?.flatten() {
            let below = dir.join(entry.file_name());
            if let Some(found) = &mut found {
                // A directory of any size may be moved here.
                if found.len() >= MAX_EVENTS {
                    return Err(io::Error::other(format!("more than {MAX_EVENTS} entries at a time")));
                }
                found.push((EventType::Create, below.clone()));
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                match self.add(&below, found.as_deref_mut()) {
                    Err(error) if is_gone(&error) => {}
                    added => added?,
                }
            }
        }
        Ok(())
    }

    /// The next events.
    pub(crate) async fn next(&mut self) -> io::Result<Vec<Event>> {
        loop {
            let mut buffer = vec![MaybeUninit::uninit(); BUFFER];
            let read = self.fd.async_io(Interest::READABLE, |fd| read(fd, &mut buffer)).await?;
            let mut events = Vec::new();
            for (id, what, name) in read {
                self.take(id, what, name, &mut events)?;
            }
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }

    fn take(&mut self, id: i32, what: ReadFlags, name: Option<PathBuf>, events: &mut Vec<Event>) -> io::Result<()> {
        if what.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Err(io::Error::other("more has happened than the kernel keeps"));
        }
        if what.contains(ReadFlags::IGNORED) {
            self.dirs.remove(&id);
            return Ok(());
        }
        let Some(dir) = self.dirs.get(&id) else { return Ok(()) };
        // For the directories below, their parents report the same.
        let is_own = what.intersects(ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF);
        if is_own && !dir.as_os_str().is_empty() {
            return Ok(());
        }
        let path = name.map_or_else(|| dir.clone(), |name| dir.join(name));
        let kinds = [
            (ReadFlags::CREATE | ReadFlags::MOVED_TO, EventType::Create),
            (ReadFlags::MOVED_FROM | ReadFlags::MOVE_SELF, EventType::Rename),
            (ReadFlags::ATTRIB, EventType::Chmod),
            (ReadFlags::MODIFY, EventType::Write),
            (ReadFlags::DELETE | ReadFlags::DELETE_SELF, EventType::Remove),
        ];
        events.extend(kinds.iter().filter(|(flag, _)| what.intersects(*flag)).map(|(_, kind)| (*kind, path.clone())));
        let is_new_dir = what.contains(ReadFlags::ISDIR) && what.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
        if self.is_recursive && is_new_dir {
            match self.add(&path, Some(events)) {
                Err(error) if !is_gone(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

type Raw = (i32, ReadFlags, Option<PathBuf>);

fn read(fd: &OwnedFd, buffer: &mut [MaybeUninit<u8>]) -> io::Result<Vec<Raw>> {
    let mut reader = Reader::new(fd, buffer);
    let mut events = Vec::new();
    loop {
        match reader.next() {
            Ok(event) => {
                let name =
                    event.file_name().map(|name| Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())).to_owned());
                events.push((event.wd(), event.events(), name));
            }
            Err(Errno::AGAIN) if !events.is_empty() => return Ok(events),
            Err(error) => return Err(error.into()),
        }
        if reader.is_buffer_empty() {
            return Ok(events);
        }
    }
}
