//! The changes of the root file system since an instant, as a layer of an OCI image.
//!
//! `POST /clade/layer/begin` keeps the identity of every file. `POST /clade/layer` answers with an
//! archive of the files that have another identity by then, and a whiteout for each missing one.
//! The kernel changes a file's change time with its content and metadata, so no content is compared.
//!
//! Only the root's own file system counts: a mount point is in no layer, nor is anything below it.
//! Sockets are left out, as in every layer.

mod archive;
mod files;
#[cfg(test)]
mod tests;

pub(crate) use archive::{Pieces, write as write_archive};
pub(crate) use files::{Baseline, Files, LayerError, chain};
