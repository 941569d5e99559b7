//! Options of a pull.

use std::path::PathBuf;
use std::time::Duration;

use crate::credentials::Credentials;
use crate::limits::ImageLimits;

/// Options of a pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Whether to use a registry without TLS although it is on another machine.
    pub is_insecure: bool,
    /// The credentials for a registry that requires them.
    pub credentials: Option<Credentials>,
    /// A file of certificates (PEM): a registry's must be one of them, or be signed by one.
    /// Requires TLS.
    pub ca: Option<PathBuf>,
    /// The limits of the image.
    pub limits: ImageLimits,
    /// Maximum silence of a registry within a body. Default: 60 s.
    pub stall: Option<Duration>,
}
