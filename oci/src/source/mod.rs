//! Sources of content. Sources are not trusted: content is checked by digest.

mod archive;
mod layout;
mod registry;
mod stall;

use std::io::{self, Read};
use std::path::PathBuf;

use thiserror::Error;

use crate::digest::{Digest, DigestError};
use crate::manifest::{Descriptor, ManifestError};
use crate::options::PullOptions;
use crate::reference::Reference;
use crate::tar::TarError;

/// Why a source did not provide an image.
#[derive(Debug, Error)]
pub enum SourceError {
    /// A file of the source cannot be used.
    #[error("{path} cannot be read")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The directory is not a layout.
    #[error("{0} is not an OCI layout: {1}")]
    Layout(PathBuf, &'static str),
    /// The source has no image of that name.
    #[error("{place} has no image {wanted:?}; it has {found}")]
    NoImage {
        /// The source.
        place: String,
        /// The requested name.
        wanted: String,
        /// The names of its images.
        found: String,
    },
    /// The reference does not select one of several images.
    #[error("{place} has several images, and none was named; it has {found}")]
    Several {
        /// The source.
        place: String,
        /// The names of its images.
        found: String,
    },
    /// An archive lacks a file that it refers to.
    #[error("the archive {0} has no {1}")]
    Missing(PathBuf, String),
    /// The archive is refused.
    #[error("the archive {0}")]
    Archive(PathBuf, #[source] TarError),
    /// The manifest of an archive has layers missing from its configuration.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Content does not match its digest.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// A registry answers with an error.
    #[error("{url} answers {status}")]
    Status {
        /// The request's address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// A registry does not answer.
    #[error("{url} does not answer")]
    Http {
        /// The request's address.
        url: String,
        /// The cause.
        #[source]
        source: Box<ureq::Error>,
    },
    /// An answer ends too early.
    #[error("the answer of {url} cannot be read to its end")]
    Answer {
        /// The request's address.
        url: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A registry requires an unknown kind of authentication.
    #[error("{url} asks for {asked}, which is not known")]
    Challenge {
        /// The request's address.
        url: String,
        /// The registry's challenge.
        asked: String,
    },
    /// A registry requires credentials for the image.
    #[error(
        "the registry {registry} wants a name and a password: --username NAME --password-stdin, or \"auths\" of docker's \
         configuration"
    )]
    Anonymous {
        /// The registry's host.
        registry: String,
    },
    /// A registry rejects the credentials.
    #[error("the registry {registry} refuses the name and the password, or does not let them have the image")]
    Refused {
        /// The registry's host.
        registry: String,
    },
    /// The credentials would be sent without TLS, or to a host other than the registry.
    #[error("the password for the registry {registry} is not sent to {to}: one of them is asked without TLS")]
    Clear {
        /// The registry's host.
        registry: String,
        /// The destination.
        to: String,
    },
    /// A file contains no certificates.
    #[error("{0} has no certificate in PEM")]
    NoCertificate(PathBuf),
    /// The token server returns no token.
    #[error("{0} gives no token")]
    NoToken(String),
}

/// A source of content.
pub(crate) trait ImageSource {
    /// The document of the reference: an index or a manifest. The descriptor is that of the
    /// received bytes.
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError>;
    /// Another document.
    fn manifest(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError>;
    /// A configuration or a layer.
    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError>;
}

/// Opens the source of a reference.
pub(crate) fn open(reference: &Reference, options: &PullOptions) -> Result<Box<dyn ImageSource>, SourceError> {
    Ok(match reference {
        Reference::Layout { dir, tag } => Box::new(layout::OciLayout::open(dir, tag.as_deref())?),
        Reference::Archive { file } => Box::new(archive::Archive::open(file)?),
        Reference::Registry { host, name, version } => {
            let is_loopback = reference.is_loopback();
            Box::new(registry::Registry::new((host, is_loopback), name, version, options)?)
        }
    })
}

/// Names for a message, up to a limit.
fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<String> = names.into_iter().take(10).map(|name| name.escape_debug().to_string()).collect();
    if names.is_empty() { "none with a name".to_owned() } else { names.join(", ").chars().take(400).collect() }
}

fn missing(place: &std::path::Path, digest: &Digest) -> SourceError {
    SourceError::Missing(place.to_owned(), digest.to_string())
}
