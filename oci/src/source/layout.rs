//! An OCI layout: `oci-layout`, `index.json`, and `blobs/`.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::{ImageSource, SourceError, listed};
use crate::limits::MAX_DOCUMENT;
use crate::manifest::{Descriptor, Document, ManifestError, document};

const TAG: &str = "org.opencontainers.image.ref.name";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A layout's directory.
#[derive(Debug)]
pub(super) struct OciLayout {
    dir: PathBuf,
    /// The directory, out of which paths cannot lead.
    handle: File,
    tag: Option<String>,
}

impl OciLayout {
    pub(super) fn open(dir: &Path, tag: Option<&str>) -> Result<Self, SourceError> {
        let handle = File::open(dir).map_err(|source| SourceError::File { path: dir.to_owned(), source })?;
        let layout = Self { dir: dir.to_owned(), handle, tag: tag.map(str::to_owned) };
        let marker = layout.read("oci-layout")?;
        let version: Result<serde_json::Value, _> = serde_json::from_slice(&marker);
        match version.as_ref().ok().and_then(|marker| marker["imageLayoutVersion"].as_str()) {
            Some("1.0.0") => Ok(layout),
            _ => Err(SourceError::Layout(layout.dir, "its oci-layout is not that of version 1.0.0")),
        }
    }

    fn file(&self, name: &str) -> Result<File, SourceError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let failed = |source: io::Error| SourceError::File { path: self.dir.join(name), source };
        let file = openat2(&self.handle, name, flags, Mode::empty(), resolve);
        let file = file.map(File::from).map_err(|error| failed(error.into()))?;
        // Reading a pipe would never end.
        match file.metadata() {
            Ok(what) if what.is_file() => Ok(file),
            Ok(_) => Err(failed(io::Error::other("it is no regular file"))),
            Err(error) => Err(failed(error)),
        }
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let mut bytes = Vec::new();
        let failed = |source| SourceError::File { path: self.dir.join(name), source };
        self.file(name)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(failed)?;
        let found = bytes.len() as u64;
        if found > MAX_DOCUMENT {
            return Err(ManifestError::TooLong { what: self.dir.join(name).display().to_string(), found }.into());
        }
        Ok(bytes)
    }
}

impl ImageSource for OciLayout {
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError> {
        let bytes = self.read("index.json")?;
        let Document::Index(manifests) = document(INDEX, &bytes)? else {
            return Err(SourceError::Layout(self.dir.clone(), "its index.json is no index"));
        };
        let name_of = |one: &Descriptor| one.annotations.get(TAG).cloned();
        let place = || self.dir.display().to_string();
        let names: Vec<String> = manifests.iter().filter_map(name_of).collect();
        let found = || listed(names.iter().map(String::as_str));
        let chosen = match &self.tag {
            Some(tag) => manifests
                .iter()
                .find(|one| name_of(one).as_ref() == Some(tag))
                .ok_or_else(|| SourceError::NoImage { place: place(), wanted: tag.clone(), found: found() })?,
            None => match &manifests[..] {
                [one] => one,
                [] => return Err(SourceError::Layout(self.dir.clone(), "it has no image")),
                _ => return Err(SourceError::Several { place: place(), found: found() }),
            },
        };
        let mut bytes = Vec::new();
        let path = self.dir.join("blobs").join(chosen.digest.algorithm()).join(chosen.digest.hex());
        let read = self.manifest(chosen)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
        read.map_err(|source| SourceError::File { path, source })?;
        Ok((chosen.clone(), bytes))
    }

    fn manifest(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        self.blob(wanted)
    }

    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        let name = format!("blobs/{}/{}", wanted.digest.algorithm(), wanted.digest.hex());
        Ok(Box::new(self.file(&name)?))
    }
}
