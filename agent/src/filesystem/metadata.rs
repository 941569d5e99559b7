//! Notes of clients on files: extended attributes `user.e2b.*`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;

use hyper::header::HeaderMap;
use rustix::fs::{XattrFlags, flistxattr, fremovexattr, fsetxattr, lgetxattr, llistxattr};
use rustix::io::Errno;

const PREFIX: &str = "user.e2b.";
const HEADER: &str = "x-metadata-";
/// Maximum length of a key, and of all keys and values of a file.
const MAX_KEY: usize = 246;
const MAX_ALL: usize = 4096;
/// Room for the list of names, which the kernel bounds at 64 KiB.
const MAX_LIST: usize = 64 << 10;

/// The notes in an upload's headers.
pub(crate) fn of_headers(headers: &HeaderMap) -> Result<BTreeMap<String, String>, &'static str> {
    let mut notes = BTreeMap::new();
    for (name, value) in headers {
        let Some(key) = name.as_str().strip_prefix(HEADER).filter(|key| !key.is_empty()) else { continue };
        let is_printable = value.as_bytes().iter().all(|byte| (b' '..=b'~').contains(byte));
        let value =
            value.to_str().ok().filter(|_| is_printable).ok_or("invalid metadata: printable ASCII is wanted")?;
        if key.len() > MAX_KEY {
            return Err("invalid metadata: a key is longer than 246 bytes");
        }
        notes.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    let all: usize = notes.iter().map(|(key, value)| PREFIX.len() + key.len() + value.len()).sum();
    if all > MAX_ALL { Err("invalid metadata: more than 4096 bytes in all") } else { Ok(notes) }
}

fn names(list: &[u8]) -> impl Iterator<Item = &str> {
    let names = list.split(|byte| *byte == 0).filter_map(|name| std::str::from_utf8(name).ok());
    names.filter(|name| name.starts_with(PREFIX))
}

/// The notes on a file. Empty on a file system without them.
pub(super) fn read(path: &Path) -> BTreeMap<String, String> {
    let mut notes = BTreeMap::new();
    // Most files have no attributes at all.
    let Ok(length @ 1..) = llistxattr(path, &mut [0u8; 0]) else { return notes };
    let mut list = vec![0; length.min(MAX_LIST)];
    let Ok(length) = llistxattr(path, &mut list[..]) else { return notes };
    for name in names(&list[..length]) {
        let mut value = vec![0; MAX_ALL];
        if let Ok(length) = lgetxattr(path, name, &mut value[..]) {
            let value = String::from_utf8_lossy(&value[..length]).into_owned();
            notes.insert(name[PREFIX.len()..].to_owned(), value);
        }
    }
    notes
}

/// Gives a file these notes and no others.
pub(crate) fn write(file: &File, notes: &BTreeMap<String, String>) -> io::Result<()> {
    let mut list = vec![0; MAX_LIST];
    let length = match flistxattr(file, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for name in names(&list[..length]) {
        fremovexattr(file, name)?;
    }
    for (key, value) in notes {
        match fsetxattr(file, format!("{PREFIX}{key}"), value.as_bytes(), XattrFlags::empty()) {
            // As in /proc and on file systems in memory: the file is written without notes.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_bounded() {
        let of = |pairs: &[(&str, &str)]| {
            let header = |(name, value): &(&str, &str)| (name.parse().unwrap(), value.parse().unwrap());
            of_headers(&pairs.iter().map(header).collect::<HeaderMap>())
        };
        let notes = of(&[("X-Metadata-Owner", "Ann B"), ("x-metadata-", "none"), ("x-other", "none")]).unwrap();
        assert_eq!(notes, BTreeMap::from([("owner".to_owned(), "Ann B".to_owned())]));
        of(&[("x-metadata-a", &"v".repeat(5000))]).unwrap_err();
        of(&[(&format!("x-metadata-{}", "k".repeat(300)), "v")]).unwrap_err();
    }
}
