//! A layer's archive: the changed files, and a whiteout for each removed one.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use bytes::Bytes;
use rustix::fs::{OFlags, lgetxattr, llistxattr};
use tar::{Builder, EntryType, Header};
use tokio::sync::mpsc;

use super::files::{Change, LayerError, WHITEOUT, failed, name, place};

/// Attributes that are a part of an image.
const XATTRS: [&[u8]; 2] = [b"user.", b"security.capability"];
/// The key of an attribute in an archive.
const XATTR_KEY: &str = "SCHILY.xattr.";
/// Most bytes of an attribute's value, as in Linux.
const MAX_XATTR: usize = 64 << 10;
/// Longest name, or target of a link, in a header. A longer one has a record of its own.
const MAX_SHORT: usize = 100;
const PIECE: usize = 256 << 10;

/// Sends what is written to it, in pieces.
pub(crate) struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    piece: Vec<u8>,
}

impl Pieces {
    pub(crate) fn new(sender: mpsc::Sender<io::Result<Bytes>>) -> Self {
        Self { sender, piece: Vec::with_capacity(PIECE) }
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() >= PIECE {
            self.flush()?;
        }
        let taken = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.sender.blocking_send(Ok(piece.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Writes the archive of `changes` to the files at `root`.
pub(crate) fn write(root: &Path, changes: &[Change], out: impl Write) -> Result<(), LayerError> {
    let mut archive = Archive { root, builder: Builder::new(out), links: HashMap::new() };
    for change in changes {
        match change {
            Change::Present(path) => archive.add(path).map_err(failed(&place(root, path)))?,
            Change::Removed(path) => archive.hide(path).map_err(failed(&place(root, path)))?,
        }
    }
    let done = archive.builder.into_inner().and_then(|mut out| out.flush());
    done.map_err(failed(root))
}

struct Archive<'a, W: Write> {
    root: &'a Path,
    builder: Builder<W>,
    /// The first path of each file with several names.
    links: HashMap<u64, Vec<u8>>,
}

fn header(found: &Metadata, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(found.mode() & 0o7777);
    header.set_uid(found.uid().into());
    header.set_gid(found.gid().into());
    header.set_mtime(u64::try_from(found.mtime()).unwrap_or_default());
    header.set_size(size);
    header
}

impl<W: Write> Archive<'_, W> {
    /// Adds a file. One that was removed meanwhile is left out, as if it had been so before.
    fn add(&mut self, path: &[u8]) -> io::Result<()> {
        let place = place(self.root, path);
        let found = match fs::symlink_metadata(&place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        let kind = found.file_type();
        if !kind.is_dir() && found.nlink() > 1 {
            if let Some(first) = self.links.get(&found.ino()) {
                let first = first.clone();
                return self.entry(header(&found, EntryType::Link, 0), path, &first, Vec::new(), io::empty());
            }
            self.links.insert(found.ino(), path.to_vec());
        }
        let records = xattrs(&place)?;
        if kind.is_file() {
            return self.add_content(path, &place, records);
        }
        if kind.is_symlink() {
            let target = fs::read_link(&place)?.into_os_string().into_vec();
            return self.entry(header(&found, EntryType::Symlink, 0), path, &target, records, io::empty());
        }
        let entry = match kind {
            _ if kind.is_dir() => EntryType::Directory,
            _ if kind.is_char_device() => EntryType::Char,
            _ if kind.is_block_device() => EntryType::Block,
            _ if kind.is_fifo() => EntryType::Fifo,
            _ => return Ok(()),
        };
        let mut header = header(&found, entry, 0);
        if matches!(entry, EntryType::Char | EntryType::Block) {
            header.set_device_major(rustix::fs::major(found.rdev()))?;
            header.set_device_minor(rustix::fs::minor(found.rdev()))?;
        }
        self.entry(header, path, b"", records, io::empty())
    }

    /// Writes an entry. Names are written as they are: the crate's own functions normalize them.
    fn entry(
        &mut self,
        mut header: Header,
        path: &[u8],
        target: &[u8],
        mut records: Vec<(String, Vec<u8>)>,
        content: impl Read,
    ) -> io::Result<()> {
        // That of the root.
        let path = if path.is_empty() { b"./" } else { path };
        if let Some(fields) = header.as_gnu_mut() {
            for (field, bytes, key) in [(&mut fields.name, path, "path"), (&mut fields.linkname, target, "linkpath")] {
                if bytes.len() > MAX_SHORT {
                    records.push((key.to_owned(), bytes.to_vec()));
                }
                let short = bytes.len().min(MAX_SHORT);
                field[..short].copy_from_slice(&bytes[..short]);
            }
        }
        header.set_cksum();
        if !records.is_empty() {
            self.builder.append_pax_extensions(records.iter().map(|(key, value)| (&key[..], &value[..])))?;
        }
        self.builder.append(&header, content)
    }

    fn add_content(&mut self, path: &[u8], place: &Path, records: Vec<(String, Vec<u8>)>) -> io::Result<()> {
        // A link or a pipe that took the file's place is neither followed nor waited for.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(place)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("it has become another kind of file"));
        }
        let content = ExactReader { file, left: found.len() };
        self.entry(header(&found, EntryType::Regular, found.len()), path, b"", records, content)
    }

    /// Adds a whiteout, which hides a file of a lower layer.
    fn hide(&mut self, path: &[u8]) -> io::Result<()> {
        let name = name(path);
        let hidden = [&path[..path.len() - name.len()], WHITEOUT, name].concat();
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o600);
        header.set_size(0);
        self.entry(header, &hidden, b"", Vec::new(), io::empty())
    }
}

/// The attributes of a file that are a part of an image, as records. One with `=` in its name would
/// be read as another, and is left out.
fn xattrs(place: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut names = vec![0; MAX_XATTR];
    let length = match llistxattr(place, &mut names[..]) {
        // Not every file system has attributes, nor every kind of file.
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::PERM) => return Ok(Vec::new()),
        length => length?,
    };
    let mut all = Vec::new();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty() && !name.contains(&b'='));
    for name in names.filter(|name| XATTRS.iter().any(|prefix| name.starts_with(prefix))) {
        let mut value = vec![0; MAX_XATTR];
        let length = lgetxattr(place, OsStr::from_bytes(name), &mut value[..])?;
        value.truncate(length);
        if let Ok(name) = std::str::from_utf8(name) {
            all.push((format!("{XATTR_KEY}{name}"), value));
        }
    }
    Ok(all)
}

/// Reads a file's size as in its header: of a file that grows not more, and of one that shrinks an
/// error.
struct ExactReader {
    file: File,
    left: u64,
}

impl Read for ExactReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it has become shorter"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}
