//! The output of `docker save`: a tar archive with `manifest.json`. It lacks digests of layers, but
//! its configuration has those of the unpacked ones, from which a manifest is made. Layers may be packed:
//! then the manifest has the digests of what the archive has.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ImageSource, SourceError, missing};
use crate::digest::{Digest, DigestReader};
use crate::limits::MAX_DOCUMENT;
use crate::manifest::{Descriptor, ImageConfig, ImageManifest, ManifestError};
use crate::tar::{TarKind, TarReader, shown};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Maximum number of files in an archive.
const MAX_FILES: usize = 65_536;
/// Maximum number of links from one file to the next.
const MAX_LINKS: usize = 8;

/// Position of content in the archive.
#[derive(Clone, Copy, Debug)]
struct ArchiveRange {
    offset: u64,
    size: u64,
}

#[derive(Debug)]
enum ArchiveMember {
    File(ArchiveRange),
    Link(Vec<u8>),
}

/// An archive of Docker's.
#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    file: File,
    manifest: (Descriptor, Vec<u8>),
    blobs: HashMap<Digest, ArchiveRange>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    layers: Vec<String>,
}

/// A path without `.`, `..` and the components they cancel. None if it leaves the archive.
fn normal(path: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join(&b'/'))
}

/// A range of a file.
struct RangeReader<'a> {
    file: &'a File,
    range: ArchiveRange,
}

impl Read for RangeReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.range.size).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..want], self.range.offset)?;
        self.range.offset += read as u64;
        self.range.size -= read as u64;
        Ok(read)
    }
}

impl Archive {
    pub(super) fn open(path: &Path) -> Result<Self, SourceError> {
        let failed = |source| SourceError::File { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("it is no regular file")));
        }
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let members = members(path, &file)?;
        let find = |name: &str| {
            let range = find(&members, name.as_bytes());
            range.ok_or_else(|| SourceError::Missing(path.to_owned(), shown(name.as_bytes())))
        };
        let document = |range: ArchiveRange, what: &str| -> Result<Vec<u8>, SourceError> {
            if range.size > MAX_DOCUMENT {
                return Err(ManifestError::TooLong { what: what.to_owned(), found: range.size }.into());
            }
            let mut bytes = Vec::new();
            RangeReader { file: &file, range }.read_to_end(&mut bytes).map_err(failed)?;
            Ok(bytes)
        };
        let bytes = document(find("manifest.json")?, "manifest.json")?;
        let saved: Result<Vec<DockerManifest>, _> = serde_json::from_slice(&bytes);
        let saved = saved.map_err(|source| ManifestError::Json { what: "manifest.json".to_owned(), source })?;
        let [saved] = &saved[..] else {
            let (place, found) = (path.display().to_string(), format!("{} images", saved.len()));
            return Err(SourceError::Several { place, found });
        };
        let config_range = find(&saved.config)?;
        let config = document(config_range, "the configuration")?;
        let parsed = ImageConfig::parse(&config)?;
        if parsed.diff_ids.len() != saved.layers.len() {
            let (manifest, config) = (saved.layers.len(), parsed.diff_ids.len());
            return Err(ManifestError::Layers { manifest, config }.into());
        }
        let mut blobs = HashMap::from([(Digest::of(&config), config_range)]);
        let mut layers = Vec::new();
        for (name, digest) in saved.layers.iter().zip(parsed.diff_ids) {
            let range = find(name)?;
            let suffix = packing(&file, range).map_err(failed)?;
            let digest = match suffix {
                "" => digest,
                _ => digest_of(&file, range).map_err(failed)?,
            };
            blobs.insert(digest.clone(), range);
            layers.push(Descriptor { digest, size: range.size, ..Descriptor::of(&format!("{LAYER}{suffix}"), b"") });
        }
        let manifest = ImageManifest::of(&config, layers).to_bytes();
        Ok(Self { path: path.to_owned(), file, manifest, blobs })
    }
}

/// How a layer is packed, as the suffix of its media type.
fn packing(file: &File, range: ArchiveRange) -> io::Result<&'static str> {
    let mut start = Vec::new();
    RangeReader { file, range }.take(4).read_to_end(&mut start)?;
    Ok(match &start[..] {
        [0x1f, 0x8b, ..] => "+gzip",
        [0x28, 0xb5, 0x2f, 0xfd] => "+zstd",
        _ => "",
    })
}

/// The SHA-256 of a range.
fn digest_of(file: &File, range: ArchiveRange) -> io::Result<Digest> {
    let mut reader = DigestReader::new(RangeReader { file, range }, &Digest::of(b""));
    io::copy(&mut reader, &mut io::sink())?;
    Ok(reader.digest())
}

fn members(path: &Path, file: &File) -> Result<HashMap<Vec<u8>, ArchiveMember>, SourceError> {
    let refused = |source| SourceError::Archive(path.to_owned(), source);
    let failed = |source| SourceError::File { path: path.to_owned(), source };
    let length = file.metadata().map_err(failed)?.len();
    let mut archive = TarReader::new(file);
    let mut members = HashMap::new();
    while let Some(header) = archive.next_entry().map_err(refused)? {
        let mut at = file;
        let offset = at.stream_position().map_err(failed)?;
        let member = match header.kind {
            TarKind::File if offset.checked_add(header.size).is_none_or(|end| end > length) => {
                return Err(refused(crate::tar::TarError::Truncated(shown(&header.path))));
            }
            TarKind::File => {
                // Skips the content of layers.
                at.seek_relative(i64::try_from(header.size).unwrap_or_default()).map_err(failed)?;
                archive.content_was_skipped();
                ArchiveMember::File(ArchiveRange { offset, size: header.size })
            }
            TarKind::Symlink => {
                let parent = header.path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
                ArchiveMember::Link([&header.path[..parent], &header.link].concat())
            }
            TarKind::HardLink => ArchiveMember::Link(header.link),
            _ => continue,
        };
        if let Some(name) = normal(&header.path) {
            members.insert(name, member);
        }
        if members.len() > MAX_FILES {
            let limit = crate::limits::LimitError::Entries(MAX_FILES as u64);
            return Err(refused(limit.into()));
        }
    }
    Ok(members)
}

fn find(members: &HashMap<Vec<u8>, ArchiveMember>, name: &[u8]) -> Option<ArchiveRange> {
    let mut name = normal(name)?;
    for _ in 0..MAX_LINKS {
        match members.get(&name)? {
            ArchiveMember::File(range) => return Some(*range),
            ArchiveMember::Link(next) => name = normal(next)?,
        }
    }
    None
}

impl ImageSource for Archive {
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError> {
        Ok(self.manifest.clone())
    }

    fn manifest(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        Err(missing(&self.path, &wanted.digest))
    }

    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        let range = *self.blobs.get(&wanted.digest).ok_or_else(|| missing(&self.path, &wanted.digest))?;
        Ok(Box::new(RangeReader { file: &self.file, range }))
    }
}
