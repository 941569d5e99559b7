//! A block device that records its writes and flushes in order: a loop device over a file in this
//! process's own FUSE file system.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use clade_test_support::Random;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, WriteFlags,
};

const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

/// A file system to try.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    bytes: usize,
    mkfs: &'static [&'static str],
}

pub(crate) const EXT4: Kind = Kind {
    name: "ext4",
    bytes: 24 << 20,
    mkfs: &["-q", "-b", "4096", "-I", "256", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
};
/// With reflinks, like the next.
pub(crate) const BTRFS: Kind = Kind { name: "btrfs", bytes: 48 << 20, mkfs: &["-q", "-M"] };
/// Below the supported minimum size.
pub(crate) const XFS: Kind = Kind { name: "xfs", bytes: 48 << 20, mkfs: &["-q", "--unsupported"] };

/// A request to the device.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write { offset: usize, bytes: Vec<u8> },
    Flush,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    log: Vec<Event>,
}

impl State {
    fn write(&mut self, offset: usize, bytes: Vec<u8>) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(&bytes);
        self.log.push(Event::Write { offset, bytes });
    }
}

/// The file system with one file in it.
struct OneFile(Arc<Mutex<State>>, usize);

fn attributes(file: bool, bytes: usize) -> FileAttr {
    FileAttr {
        ino: if file { FILE } else { INodeNo::ROOT },
        size: if file { bytes as u64 } else { 0 },
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if file { FileType::RegularFile } else { FileType::Directory },
        perm: if file { 0o600 } else { 0o700 },
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        flags: 0,
        blksize: 4096,
    }
}

impl Filesystem for OneFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &attributes(true, self.1), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &attributes(ino == FILE, self.1));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // No cache in between: writes of the loop device arrive here at once.
        reply.opened(FileHandle(1), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let state = self.0.lock().unwrap();
        let start = (offset as usize).min(self.1);
        reply.data(&state.bytes[start..(start + size as usize).min(self.1)]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.0.lock().unwrap().write(offset as usize, data.to_vec());
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().log.push(Event::Flush);
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, offset: u64, len: u64, _: i32, reply: ReplyEmpty) {
        self.0.lock().unwrap().write(offset as usize, vec![0; len as usize]);
        reply.ok();
    }
}

/// See the module's documentation.
pub(crate) struct Recorder {
    kind: Kind,
    state: Arc<Mutex<State>>,
    dir: tempfile::TempDir,
    _session: BackgroundSession,
}

fn run(program: &str, args: &[&OsStr]) -> Result<(), String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program} {args:?}: {text}")) }
}

impl Recorder {
    pub(crate) fn new(kind: Kind) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
        let [at, _] = [dir.path().join("device"), dir.path().join("mnt")].map(|path| {
            std::fs::create_dir(&path).unwrap();
            path
        });
        let state = Arc::new(Mutex::new(State { bytes: vec![0; kind.bytes], log: Vec::new() }));
        let session = fuser::spawn_mount(OneFile(Arc::clone(&state), kind.bytes), at, &Config::default());
        let session = session.map_err(|error| format!("FUSE: {error}"))?;
        Ok(Self { kind, state, dir, _session: session })
    }

    /// The bytes of an empty file system.
    pub(crate) fn format(&self) -> Result<Vec<u8>, String> {
        let path = self.dir.path().join("empty");
        std::fs::write(&path, vec![0; self.kind.bytes]).map_err(|error| error.to_string())?;
        let args: Vec<&OsStr> = self.kind.mkfs.iter().map(OsStr::new).chain([path.as_os_str()]).collect();
        run(&format!("mkfs.{}", self.kind.name), &args)?;
        std::fs::read(&path).map_err(|error| error.to_string())
    }

    /// Initializes the device with `bytes`, and mounts it.
    pub(crate) fn mount(&self, bytes: Vec<u8>) -> Result<Mounted<'_>, String> {
        *self.state.lock().unwrap() = State { bytes, log: Vec::new() };
        let (disk, at) = (self.dir.path().join("device").join(NAME), self.dir.path().join("mnt"));
        let options = ["-t", self.kind.name, "-o", "loop,noatime"].map(OsStr::new);
        let args: Vec<&OsStr> = options.into_iter().chain([disk.as_os_str(), at.as_os_str()]).collect();
        run("mount", &args)?;
        Ok(Mounted { recorder: self, at, unmounted: false })
    }

    /// Number of events so far.
    pub(crate) fn position(&self) -> usize {
        self.state.lock().unwrap().log.len()
    }

    pub(crate) fn take_log(&self) -> Vec<Event> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

/// Unmounted on drop.
pub(crate) struct Mounted<'r> {
    recorder: &'r Recorder,
    at: PathBuf,
    unmounted: bool,
}

impl Mounted<'_> {
    pub(crate) fn path(&self) -> &Path {
        &self.at
    }

    /// Unmounts the file system, and returns the requests to the device before that.
    pub(crate) fn unmount(mut self) -> Vec<Event> {
        let before = self.recorder.position();
        self.unmounted = true;
        run("umount", &[self.at.as_os_str()]).unwrap();
        let mut log = self.recorder.take_log();
        log.truncate(before);
        log
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if !self.unmounted {
            let _ = run("umount", &[OsStr::new("-l"), self.at.as_os_str()]);
        }
    }
}

/// Possible contents of the device after a power cut before event `at`: all flushed writes, and any
/// part of the others.
pub(crate) fn cut(start: &[u8], log: &[Event], at: usize, random: &mut Random) -> Vec<u8> {
    let flushed = log[..at].iter().rposition(|event| matches!(event, Event::Flush)).unwrap_or(0);
    let mut bytes = start.to_vec();
    // All of the rest, none of it, or a random part.
    let kept = random.below(3);
    for (number, event) in log[..at].iter().enumerate() {
        let Event::Write { offset, bytes: written } = event else { continue };
        let lost = number >= flushed && (kept == 0 || kept == 1 && random.below(2) == 0);
        if !lost {
            bytes[*offset..offset + written.len()].copy_from_slice(written);
        }
    }
    bytes
}
