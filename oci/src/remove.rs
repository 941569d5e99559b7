//! Lookup of images by text, and their removal.

use thiserror::Error;

use crate::digest::Digest;
use crate::lease::stays_open;
use crate::reference::{ImageName, Reference, canonical_name};
use crate::store::{Image, ImageStore, ImageStoreError};

/// Minimum number of digits of an abbreviated digest.
const MIN_DIGITS: usize = 6;

/// Why an image was not found, or not removed.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The store fails.
    #[error(transparent)]
    Store(#[from] ImageStoreError),
    /// No image has that name.
    #[error("there is no image {0:?}")]
    NotFound(String),
    /// Several digests begin with the text.
    #[error("{0:?} is the beginning of several digests")]
    Ambiguous(String),
    /// A VM or a checkpoint uses its disk.
    #[error("the disk of {0} is in use")]
    InUse(String),
    /// The image has other names.
    #[error("{digest} has the names {}; remove them, or all by the digest with --force", names.join(", "))]
    Named {
        /// The image.
        digest: Digest,
        /// Its names.
        names: Vec<String>,
    },
}

/// The result of a removal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// The image, if it has no names left.
    pub image: Option<Digest>,
    /// Its removed names.
    pub names: Vec<String>,
    /// Bytes of content freed.
    pub bytes: u64,
}

/// The names that a text may mean, the likeliest first: as it is, of the registry, and of this
/// store alone.
fn spellings(text: &str) -> Vec<String> {
    let full = text.parse::<Reference>().map(|reference| reference.to_string());
    let local = ImageName::parse(text, None).map(|name| name.to_string());
    [Some(canonical_name(text)), full.ok(), local.ok()].into_iter().flatten().collect()
}

impl ImageStore {
    /// The image of a text: a reference, a digest, or its first digits.
    ///
    /// # Errors
    /// When no image matches, or several do.
    pub fn find(&self, text: &str) -> Result<Image, ImageError> {
        let digest = self.find_digest(text)?;
        self.image(&digest)?.ok_or_else(|| ImageError::NotFound(text.to_owned()))
    }

    fn find_digest(&self, text: &str) -> Result<Digest, ImageError> {
        let names = self.references()?;
        if let Some(digest) = spellings(text).iter().find_map(|name| names.get(name)) {
            return Ok(digest.clone());
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let images = self.images()?;
        let begins = |image: &&Image| hex.len() >= MIN_DIGITS && image.digest.hex().starts_with(hex);
        let found: Vec<&Image> = images.iter().filter(begins).collect();
        match found[..] {
            [image] => Ok(image.digest.clone()),
            [] => Err(ImageError::NotFound(text.to_owned())),
            _ => Err(ImageError::Ambiguous(text.to_owned())),
        }
    }

    /// Removes a name, and the image when that was its last. A digest removes an image that has at
    /// most one name; with `is_forced`, an image with any number of names.
    ///
    /// # Errors
    /// When no image matches, or when its disk is in use. Nothing is removed then.
    pub fn remove(&self, text: &str, is_forced: bool) -> Result<Removed, ImageError> {
        let lock = self.lock()?;
        let digest = self.find_digest(text)?;
        let mut names = self.references()?;
        let full = spellings(text);
        let its: Vec<String> =
            names.iter().filter(|(_, other)| **other == digest).map(|(name, _)| name.clone()).collect();
        let one = full.into_iter().find(|name| its.contains(name));
        let gone = match one {
            Some(name) => vec![name],
            None if its.len() > 1 && !is_forced => return Err(ImageError::Named { digest, names: its }),
            None => its.clone(),
        };
        let is_last = gone.len() == its.len();
        let disk = self.disk(&digest);
        if is_last && stays_open(&disk) {
            return Err(ImageError::InUse(text.to_owned()));
        }
        names.retain(|name, _| !gone.contains(name));
        self.set_references(&lock, names)?;
        if !is_last {
            return Ok(Removed { image: None, names: gone, bytes: 0 });
        }
        if self.image(&digest)?.is_some() {
            self.remove_disk(&lock, &digest)?;
        }
        let bytes = self.sweep_of(&lock)?;
        Ok(Removed { image: Some(digest), names: gone, bytes })
    }

    /// Removes content of no image: of pulls that failed, and of removals that did not end. Returns the bytes
    /// freed.
    ///
    /// # Errors
    /// When the store fails.
    pub fn sweep(&self) -> Result<u64, ImageError> {
        let lock = self.lock()?;
        Ok(self.sweep_of(&lock)?)
    }
}
