//! Information about an entry of a directory.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use clade_agent_proto::filesystem::{EntryInfo, FileType};
use clade_agent_proto::{Code, RpcError};
use rustix::io::Errno;

use super::metadata;
use crate::clock::rfc3339;
use crate::users::Names;

fn kind(of: &Metadata) -> FileType {
    let kind = of.file_type();
    if kind.is_file() {
        FileType::File
    } else if kind.is_dir() {
        FileType::Directory
    } else if kind.is_symlink() {
        FileType::Symlink
    } else {
        FileType::Unspecified
    }
}

/// Type and permissions in letters as in Go, for clients of envd.
fn letters(of: &Metadata) -> String {
    let (kind, mode) = (of.file_type(), of.permissions().mode());
    let is_device = kind.is_block_device() || kind.is_char_device();
    let marks = [
        ('d', kind.is_dir()),
        ('L', kind.is_symlink()),
        ('D', is_device),
        ('p', kind.is_fifo()),
        ('S', kind.is_socket()),
        ('u', mode & 0o4000 != 0),
        ('g', mode & 0o2000 != 0),
        ('c', kind.is_char_device()),
        ('t', mode & 0o1000 != 0),
    ];
    let mut text: String = marks.iter().filter(|(_, is_set)| *is_set).map(|(mark, _)| mark).collect();
    if text.is_empty() {
        text.push('-');
    }
    for (bit, letter) in "rwxrwxrwx".chars().enumerate() {
        text.push(if mode & 0o400 >> bit != 0 { letter } else { '-' });
    }
    text
}

/// The information about an entry, without following a link.
pub(crate) fn entry(path: &Path, names: &Names) -> io::Result<EntryInfo> {
    let own = fs::symlink_metadata(path)?;
    let mut info = EntryInfo {
        name: path.file_name().map_or_else(|| "/".into(), |name| name.to_string_lossy().into_owned()),
        kind: kind(&own),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode: own.permissions().mode() & 0o777,
        permissions: letters(&own),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: Some(rfc3339(own.mtime(), u32::try_from(own.mtime_nsec()).unwrap_or(0))),
        symlink_target: None,
        metadata: BTreeMap::new(),
    };
    if info.kind == FileType::Symlink {
        // A dangling link has no type.
        let target = fs::canonicalize(path).ok();
        let led_to = target.as_ref().and_then(|target| fs::metadata(target).ok());
        info.kind = led_to.as_ref().map_or(FileType::Unspecified, kind);
        info.mode = led_to.map_or(0, |target| target.permissions().mode() & 0o777);
        let target = target.as_deref().unwrap_or(path);
        info.symlink_target = Some(target.to_string_lossy().into_owned());
    } else if matches!(info.kind, FileType::File | FileType::Directory) {
        info.metadata = metadata::read(path);
    }
    Ok(info)
}

/// The error of an access to `path`.
pub(crate) fn failed(path: &Path, error: &io::Error) -> RpcError {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => RpcError::not_found(format_args!("path not found: {shown}: {error}")),
        io::ErrorKind::NotADirectory | io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => {
            RpcError::invalid(format_args!("{shown}: {error}"))
        }
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            RpcError::new(Code::FailedPrecondition, format_args!("{shown}: {error}"))
        }
        _ => RpcError::internal(format_args!("{shown}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_told_with_their_types() {
        let dir = tempfile::tempdir().unwrap();
        let names = Names::read();
        let file = dir.path().join("file");
        fs::write(&file, "12345").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4640)).unwrap();
        let info = entry(&file, &names).unwrap();
        assert_eq!((info.name.as_str(), info.kind, info.size, info.mode), ("file", FileType::File, 5, 0o640));
        assert_eq!(info.permissions, "urw-r-----");
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        let link = entry(&dir.path().join("link"), &names).unwrap();
        assert_eq!((link.kind, link.mode, link.permissions.as_str()), (FileType::File, 0o640, "Lrwxrwxrwx"));
        assert_eq!(link.symlink_target.unwrap(), fs::canonicalize(&file).unwrap().to_string_lossy());
        std::os::unix::fs::symlink("nowhere", dir.path().join("broken")).unwrap();
        assert_eq!(entry(&dir.path().join("broken"), &names).unwrap().kind, FileType::Unspecified);
        assert_eq!(entry(Path::new("/dev/null"), &names).unwrap().permissions, "Dcrw-rw-rw-");
        assert_eq!(entry(Path::new("/"), &names).unwrap().name, "/");
    }
}
