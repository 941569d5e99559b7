//! Where content comes from. Nothing that a source says of it is believed: it is checked by digest.

mod archive;
mod layout;
mod registry;
mod stall;

use std::io::{self, Read};
use std::path::PathBuf;

use thiserror::Error;

use crate::digest::{Digest, DigestError};
use crate::manifest::{Descriptor, ManifestError};
use crate::pull::PullOptions;
use crate::reference::Reference;
use crate::tar::TarError;

/// A source has no such image, or does not answer.
#[derive(Debug, Error)]
pub enum SourceError {
    /// A file of it cannot be used.
    #[error("{path} cannot be read")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No layout.
    #[error("{0} is not an OCI layout: {1}")]
    Layout(PathBuf, &'static str),
    /// No image of that name.
    #[error("{place} has no image {wanted:?}; it has {found}")]
    NoImage {
        /// Where.
        place: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// Which image is not said.
    #[error("{place} has several images, and none was named; it has {found}")]
    Several {
        /// Where.
        place: String,
        /// What there is.
        found: String,
    },
    /// An archive lacks what it names.
    #[error("the archive {0} has no {1}")]
    Missing(PathBuf, String),
    /// The archive is refused.
    #[error("the archive {0}")]
    Archive(PathBuf, #[source] TarError),
    /// The manifest of an archive names layers that its configuration does not know.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Content is not what it should be.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// A registry answers with an error.
    #[error("{url} answers {status}")]
    Status {
        /// What was asked.
        url: String,
        /// The answer's number.
        status: u16,
    },
    /// A registry does not answer.
    #[error("{url} does not answer")]
    Http {
        /// What was asked.
        url: String,
        /// Why.
        #[source]
        source: Box<ureq::Error>,
    },
    /// An answer breaks off.
    #[error("the answer of {url} cannot be read to its end")]
    Answer {
        /// What was asked.
        url: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A registry wants a proof that is not known.
    #[error("{url} asks for {asked}, which is not known")]
    Challenge {
        /// What was asked.
        url: String,
        /// As it says.
        asked: String,
    },
    /// A registry lets only known users have the image.
    #[error(
        "the registry {registry} wants a name and a password: --username NAME --password-stdin, or \"auths\" of docker's \
         configuration"
    )]
    Anonymous {
        /// Its host.
        registry: String,
    },
    /// A registry does not take the name and the password.
    #[error("the registry {registry} refuses the name and the password, or does not let them have the image")]
    Refused {
        /// Its host.
        registry: String,
    },
    /// They would be sent where others can read them, or to a host that is not the registry.
    #[error("the password for the registry {registry} is not sent to {to}: one of them is asked without TLS")]
    Clear {
        /// Its host.
        registry: String,
        /// Where it would be sent.
        to: String,
    },
    /// A file of certificates has none.
    #[error("{0} has no certificate in PEM")]
    NoCertificate(PathBuf),
    /// The server of tokens gives none.
    #[error("{0} gives no token")]
    NoToken(String),
}

/// Where content is read from.
pub(crate) trait Source {
    /// The document that the reference names: an index or a manifest. The descriptor is of what came.
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError>;
    /// Another document.
    fn manifest(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError>;
    /// A configuration or a layer.
    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError>;
}

/// Opens the source that a reference names.
pub(crate) fn open(reference: &Reference, options: &PullOptions) -> Result<Box<dyn Source>, SourceError> {
    Ok(match reference {
        Reference::Layout { dir, tag } => Box::new(layout::Layout::open(dir, tag.as_deref())?),
        Reference::Archive { file } => Box::new(archive::Archive::open(file)?),
        Reference::Registry { host, name, version } => {
            let is_loopback = reference.is_loopback();
            Box::new(registry::Registry::new((host, is_loopback), name, version, options)?)
        }
    })
}

/// Names for a message, at most some.
fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.into_iter().take(10).collect();
    if names.is_empty() { "none with a name".to_owned() } else { names.join(", ").chars().take(400).collect() }
}

fn missing(place: &std::path::Path, digest: &Digest) -> SourceError {
    SourceError::Missing(place.to_owned(), digest.to_string())
}
