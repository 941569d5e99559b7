//! From a reference to a disk: documents, content, layers, file system.

use std::fs::File;
use std::io::{BufReader, Read};

use thiserror::Error;

use crate::digest::{Digest, DigestError, DigestReader};
use crate::ext4::{self, Ext4Error};
use crate::limits::{Bounded, Budget, CountedReader, LimitError, MAX_DOCUMENT};
use crate::manifest::{
    Descriptor, Document, ImageConfig, ImageManifest, MAX_NESTING, ManifestError, Packing, choose, document, packing,
};
use crate::options::PullOptions;
use crate::reference::{Reference, Version};
use crate::source::{self, ImageSource, SourceError};
use crate::store::{Image, ImageStore, ImageStoreError, StoreLock};
use crate::tar::TarError;
use crate::tree::{Layer, LayerError, Spool, Tree};

/// Why an image could not be turned into a disk.
#[derive(Debug, Error)]
pub enum PullError {
    /// The store fails.
    #[error(transparent)]
    Store(#[from] ImageStoreError),
    /// The source fails.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A document is refused.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A layer is refused.
    #[error("the layer {layer} is refused")]
    Layer {
        /// The layer.
        layer: Digest,
        /// The cause.
        #[source]
        source: LayerError,
    },
    /// A layer does not match the configuration.
    #[error("the layer {layer} does not match the diff ID in the image's configuration")]
    DiffId {
        /// The layer.
        layer: Digest,
        /// The cause.
        #[source]
        source: DigestError,
    },
    /// A decoder cannot be made.
    #[error("the layer {layer} cannot be unpacked")]
    Unpack {
        /// The layer.
        layer: Digest,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The disk cannot be made.
    #[error(transparent)]
    Disk(#[from] Ext4Error),
}

impl PullError {
    /// Whether the image itself is the reason.
    fn is_refusal(&self) -> bool {
        match self {
            // The limit of bytes may be another for the next pull.
            Self::Layer { source: LayerError::Limit(LimitError::Bytes(_)), .. }
            | Self::Layer { source: LayerError::Tar(TarError::Limit(LimitError::Bytes(_))), .. }
            | Self::Layer { source: LayerError::Spool { .. }, .. } => false,
            // An error of this host has a number, one of a decoder has none.
            Self::Layer { source: LayerError::Tar(TarError::Read(source)), .. } | Self::Unpack { source, .. } => {
                source.raw_os_error().is_none()
            }
            Self::Layer { .. } | Self::DiffId { .. } | Self::Manifest(_) => true,
            Self::Store(_) | Self::Source(_) | Self::Disk(_) => false,
        }
    }
}

/// Receiver of a pull's progress.
pub trait Progress {
    /// The fetch of content of this size begins.
    fn fetch(&self, _what: &Descriptor) {}
    /// So many further bytes were fetched.
    fn fetched(&self, _bytes: u64) {}
    /// The unpacking of a layer begins: its number, and the number of layers.
    fn unpack(&self, _layer: usize, _of: usize) {}
    /// The writing of the disk begins.
    fn write(&self) {}
}

impl Progress for () {}

/// Reports the bytes read.
struct Told<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for Told<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.progress.fetched(read as u64);
        Ok(read)
    }
}

impl ImageStore {
    /// Pulls an image, makes its disk, and gives it the reference's name. Present content is not
    /// fetched again. The registry is not asked for a digest whose image is present.
    ///
    /// # Errors
    /// When the source does not have the image, when it is refused, or when the store fails. No
    /// incomplete file has its name then.
    pub fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, PullError> {
        let lock = self.lock()?;
        if let Some(image) = self.pulled(&lock, reference)? {
            return Ok(image);
        }
        let mut source = source::open(reference, options)?;
        self.pull_from(&lock, source.as_mut(), &reference.to_string(), options, progress)
    }

    /// The image of a digest, if it is present. A tag may name another image by now.
    fn pulled(&self, lock: &StoreLock, reference: &Reference) -> Result<Option<Image>, PullError> {
        let Reference::Registry { version: Version::Digest(digest), .. } = reference else { return Ok(None) };
        let (name, mut names) = (reference.to_string(), self.references()?);
        // An index's digest names the image that an earlier pull chose from it.
        let found = names.get(&name).unwrap_or(digest).clone();
        let Some(image) = self.image(&found)? else { return Ok(None) };
        let image = self.with_config(lock, image)?;
        if names.insert(name, found).is_none() {
            self.set_references(lock, names)?;
        }
        Ok(Some(image))
    }

    /// The same from any source, under any name.
    pub(crate) fn pull_from(
        &self,
        lock: &StoreLock,
        source: &mut dyn ImageSource,
        reference: &str,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image, PullError> {
        let (name, bytes) = source.root()?;
        let pull = Pull { store: self, lock, options, progress };
        let (name, manifest) = pull.resolve(source, name, bytes)?;
        let image = match self.image(&name.digest)? {
            Some(image) => self.with_config(lock, image)?,
            None => pull.make(source, &name, &manifest).inspect_err(|error| {
                // A later pull would be refused too. After a failure it goes on with the content.
                if error.is_refusal() {
                    let own = [&name, &manifest.config].into_iter().chain(&manifest.layers);
                    // An error here is not the pull's.
                    drop(self.discard_blobs(lock, &own.cloned().collect::<Vec<_>>()));
                }
            })?,
        };
        let mut names = self.references()?;
        names.insert(reference.to_owned(), name.digest);
        self.set_references(lock, names)?;
        Ok(image)
    }

    /// The image with all of its configuration that this version reads: the record of an earlier one may lack some.
    fn with_config(&self, lock: &StoreLock, mut image: Image) -> Result<Image, PullError> {
        let config = image.blobs.get(1).and_then(|config| self.read_blob(config).ok());
        let Some(config) = config.and_then(|bytes| ImageConfig::parse(&bytes).ok()) else { return Ok(image) };
        if config.run == image.config {
            return Ok(image);
        }
        image.config = config.run;
        self.set_record(lock, &image)?;
        Ok(image)
    }
}

struct Pull<'a> {
    store: &'a ImageStore,
    lock: &'a StoreLock,
    options: &'a PullOptions,
    progress: &'a dyn Progress,
}

impl Pull<'_> {
    /// Follows indexes to a manifest, and stores the manifest.
    fn resolve(
        &self,
        source: &mut dyn ImageSource,
        mut name: Descriptor,
        mut bytes: Vec<u8>,
    ) -> Result<(Descriptor, ImageManifest), PullError> {
        for _ in 0..=MAX_NESTING {
            match document(&name.media_type, &bytes)? {
                Document::Manifest(manifest) => {
                    manifest.check(&self.options.limits)?;
                    self.store.put_blob(self.lock, &name, &bytes[..])?;
                    // The same descriptor for every source.
                    return Ok((manifest.describe(name.digest, name.size), *manifest));
                }
                Document::Index(manifests) => {
                    name = choose(manifests)?;
                    if name.size > MAX_DOCUMENT {
                        let what = format!("the manifest {}", name.digest);
                        return Err(ManifestError::TooLong { what, found: name.size }.into());
                    }
                    if !self.store.has_blob(&name) {
                        self.store.put_blob(self.lock, &name, source.manifest(&name)?)?;
                    }
                    bytes = self.store.read_blob(&name)?;
                }
            }
        }
        Err(ManifestError::Nesting(name.digest).into())
    }

    fn fetch(&self, source: &mut dyn ImageSource, wanted: &Descriptor) -> Result<(), PullError> {
        if self.store.has_blob(wanted) {
            return Ok(());
        }
        self.progress.fetch(wanted);
        let content = Told { inner: source.blob(wanted)?, progress: self.progress };
        Ok(self.store.put_blob(self.lock, wanted, content)?)
    }

    fn make(
        &self,
        source: &mut dyn ImageSource,
        name: &Descriptor,
        manifest: &ImageManifest,
    ) -> Result<Image, PullError> {
        self.fetch(source, &manifest.config)?;
        let config = ImageConfig::parse(&self.store.read_blob(&manifest.config)?)?;
        if config.diff_ids.len() != manifest.layers.len() {
            let (manifest, config) = (manifest.layers.len(), config.diff_ids.len());
            return Err(ManifestError::Layers { manifest, config }.into());
        }
        manifest.layers.iter().try_for_each(|layer| self.fetch(source, layer))?;
        let partial = self.store.partial();
        let spool = tempfile::tempfile_in(&partial);
        let spool = spool.map_err(|source| ImageStoreError::File { path: partial, what: "written", source })?;
        let (mut spool, mut tree, mut skipped) = (Spool::new(spool), Tree::new(&self.options.limits), 0);
        let mut budget = Budget::new(&self.options.limits);
        for (index, (layer, diff_id)) in manifest.layers.iter().zip(&config.diff_ids).enumerate() {
            self.progress.unpack(index + 1, manifest.layers.len());
            let file = self.store.open_blob(layer)?;
            let read = unpack(layer, file, diff_id, &mut spool, &mut budget)?;
            skipped += read.skipped;
            let refused = |source| PullError::Layer { layer: layer.digest.clone(), source };
            tree.apply(read, index).map_err(refused)?;
        }
        self.progress.write();
        let blobs = [name, &manifest.config].into_iter().chain(&manifest.layers).cloned().collect();
        self.store.put_disk(self.lock, &name.digest, |disk| {
            let bytes = ext4::write(&tree, spool.file(), &name.digest.seed(), ext4::FREE, disk)?;
            Ok(ImageStore::new_image(name.digest.clone(), blobs, config.run, bytes, skipped))
        })
    }
}

fn unpack(
    layer: &Descriptor,
    file: File,
    diff_id: &Digest,
    spool: &mut Spool,
    budget: &mut Budget,
) -> Result<Layer, PullError> {
    let (file, compressed) = CountedReader::new(BufReader::with_capacity(128 << 10, file));
    let failed = |source| PullError::Unpack { layer: layer.digest.clone(), source };
    let unpacked: Box<dyn Read> = match packing(layer)? {
        Packing::None => Box::new(file),
        // Concatenated members form one stream.
        Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::new(file))),
        Packing::Zstd => Box::new(zstd::Decoder::new(file).map_err(failed)?),
    };
    let checked = DigestReader::new(unpacked, diff_id);
    let bounded = Bounded::new(checked, compressed, budget);
    let refused = |source| PullError::Layer { layer: layer.digest.clone(), source };
    let (read, mut rest) = Layer::read(bounded, spool).map_err(refused)?;
    // Bytes after the archive are ignored, but count for the digest.
    let drained = std::io::copy(&mut rest, &mut std::io::sink());
    drained.map_err(|error| refused(crate::tar::TarError::from(error).into()))?;
    let diff = |source| PullError::DiffId { layer: layer.digest.clone(), source };
    rest.into_inner().finish(None).map_err(diff)?;
    Ok(read)
}
