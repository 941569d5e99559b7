//! Entry points of fuzz targets: bytes in, and only a result.

use std::fs::File;

use crate::limits::{Bounded, Budget, CountedReader, ImageLimits};
use crate::manifest::{Document, ImageConfig, choose, document};
use crate::tree::{Layer, LayerError, Spool, Tree};

/// Applies archives as layers, and writes the disk. Returns its length, if no archive is refused.
///
/// # Errors
/// When one is refused.
///
/// # Panics
/// When a tree that was accepted cannot be written.
pub fn unpack(archives: &[&[u8]], spool: File, disk: &File) -> Result<u64, LayerError> {
    let limits = ImageLimits { layers: 8, entries: 2000, bytes: 8 << 20, ratio: 256 };
    let (mut budget, mut spool, mut tree) = (Budget::new(&limits), Spool::new(spool), Tree::new(&limits));
    for (number, archive) in archives.iter().enumerate() {
        let (archive, count) = CountedReader::new(*archive);
        let (layer, _) = Layer::read(Bounded::new(archive, count, &mut budget), &mut spool)?;
        tree.apply(layer, number)?;
    }
    let written = crate::ext4::write(&tree, spool.file(), &[7; 32], 1 << 20, disk);
    Ok(written.unwrap_or_else(|error| panic!("an accepted tree is not written: {error}")))
}

/// Parses a document as manifest, index and configuration.
pub fn manifest(bytes: &[u8]) {
    match document("", bytes) {
        Ok(Document::Manifest(manifest)) => {
            let (_, again) = manifest.to_bytes();
            let Ok(Document::Manifest(same)) = document("", &again) else { panic!("it is written as something else") };
            assert_eq!(*same, *manifest);
            let _ = manifest.check(&ImageLimits::default());
        }
        Ok(Document::Index(manifests)) => drop(choose(manifests)),
        Err(_) => drop(ImageConfig::parse(bytes)),
    }
}
