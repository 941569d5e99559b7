//! OCI images to disks.
//!
//! An image comes from a registry, an OCI layout or an archive of Docker's. Its content is kept by
//! digest. Its layers are applied in memory, and the result is written as one ext4 file system.
//! Names in an image are never used as names on this host, root is not needed, and the same image
//! makes the same bytes.
//!
//! | topic | file |
//! |---|---|
//! | from a reference to a disk | [`ImageStore::pull`] in `pull.rs` |
//! | an image from another one and a layer | [`ImageStore::build`] in `build.rs` |
//! | stored files, and how they become visible | `store.rs` |
//! | sources of content | `source/` |
//! | archives, and refusals of their content | `tar.rs`, `limits.rs`, `xattr_rules.rs` |
//! | applying layers | `tree/` |
//! | the file system | `ext4/` |
//! | Dockerfiles, and their steps | `dockerfile/` |
//!
//! This crate runs nothing, mounts nothing, and does not know VMs.

#![deny(missing_docs)]

mod build;
mod credentials;
mod digest;
mod dockerfile;
mod ext4;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod lease;
mod limits;
mod manifest;
mod options;
mod pull;
mod reference;
mod remove;
mod source;
mod sparse;
mod store;
mod tar;
mod tree;
mod xattr_rules;

pub use build::ImageChanges;
pub use credentials::{Credentials, CredentialsError, DOCKER_CONFIG_VARIABLE};
pub use digest::{Digest, DigestError};
pub use dockerfile::{
    Action, BuildPlan, BuildStep, CopyFiles, Dockerfile, DockerfileError, Ignore, IgnoreError, MAX_DOCKERFILE, Pattern,
};
pub use ext4::Ext4Error;
pub use limits::{ImageLimits, LimitError};
pub use manifest::{Descriptor, ImageManifest, ManifestError, Platform, RunConfig};
pub use options::PullOptions;
pub use pull::{Progress, PullError};
pub use reference::{ImageName, REGISTRY_VARIABLE, Reference, ReferenceError, Version};
pub use remove::{ImageError, Removed};
pub use source::SourceError;
pub use sparse::SparseWriter;
pub use store::{DIRECTORY_VARIABLE, Image, ImageStore, ImageStoreError, StoreLock};
pub use tar::TarError;
pub use tree::LayerError;
