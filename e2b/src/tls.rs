//! TLS of the listener: a certificate from files, which are read again when they change.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use zeroize::Zeroizing;

/// Maximum length of a file.
const MAX_FILE: u64 = 1 << 20;
/// Interval of the looks at the files.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit of a handshake: that of a slow client.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a certificate cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file is too long for a certificate.
    #[error("{} has more than {MAX_FILE} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// A file has no certificate, or no key. The parser's errors have parts of the file, which may
    /// be those of a key.
    #[error("{} has no {what} in PEM form: {problem}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// The wanted item.
        what: &'static str,
        /// The fault, without any of the file's content.
        problem: &'static str,
    },
    /// The path leads to a directory, a device or a pipe.
    #[error("{} is not a regular file", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Others than the key's owner and group can read it, or others than its owner can write it.
    #[error("{} has the mode {mode:o}: only its owner may write a key, and only its owner and group read it", path.display())]
    Mode {
        /// The key's file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key is not that of the certificate, or of a kind that is not supported.
    #[error("{} and {} are no certificate with its key", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// The cause.
        #[source]
        source: rustls::Error,
    },
}

/// The files of a certificate, both in PEM form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, followed by those that lead to its root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The identity of a file's content: device, inode, length, and the time of its last change.
type FileStamp = (u64, u64, u64, i64, i64);

type Stamps = [Option<FileStamp>; 2];

#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    /// The files that were read, or that will never be a certificate.
    stamps: Stamps,
    /// The files of which a warning was logged.
    warned: Option<Stamps>,
    /// The time of the last look at the files. None while a thread looks.
    looked_at: Option<Instant>,
}

/// A listener's TLS.
#[derive(Debug)]
pub struct Tls {
    files: TlsFiles,
    loaded: Mutex<Loaded>,
}

/// Reads a file. `is_secret`: its permissions are checked too.
fn read(path: &Path, is_secret: bool) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    // Without O_NONBLOCK, the open of a pipe waits for a writer.
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(TlsError::Kind { path: path.to_owned() });
    }
    let mode = found.mode() & 0o777;
    if is_secret && mode & 0o027 != 0 {
        return Err(TlsError::Mode { path: path.to_owned(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(TlsError::TooLong { path: path.to_owned() });
    }
    Ok(bytes)
}

/// The fault of a PEM file, without any of its content.
fn problem(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::NoItemsFound => "there is none",
        pem::Error::MissingSectionEnd { .. } => "a section has no end line",
        pem::Error::IllegalSectionStart { .. } => "a section's first line is malformed",
        pem::Error::Base64Decode(_) => "a section is not base64",
        _ => "it cannot be parsed",
    }
}

impl TlsFiles {
    fn stamps(&self) -> Stamps {
        [&self.certificate, &self.key].map(|path| {
            let found = std::fs::metadata(path).ok()?;
            Some((found.dev(), found.ino(), found.len(), found.ctime(), found.ctime_nsec()))
        })
    }

    fn load(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let (certificate, key) = (read(&self.certificate, false)?, read(&self.key, true)?);
        let chain = CertificateDer::pem_slice_iter(&certificate).collect::<Result<Vec<_>, _>>();
        let chain = chain.and_then(|chain| if chain.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(chain) });
        let bad = |path: &Path, what, error| TlsError::Pem { path: path.to_owned(), what, problem: problem(&error) };
        let chain = chain.map_err(|error| bad(&self.certificate, "certificate", error))?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| bad(&self.key, "private key", error))?;
        let versions =
            ServerConfig::builder_with_provider(Arc::new(default_provider())).with_safe_default_protocol_versions();
        let config = versions.and_then(|config| config.with_no_client_auth().with_single_cert(chain, key));
        let mut config = config.map_err(|source| TlsError::Pair {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            source,
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// When they are no certificate with its key.
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        // Before they are read: a change in between is noticed.
        let stamps = files.stamps();
        let loaded = Loaded { config: files.load()?, stamps, warned: None, looked_at: Some(Instant::now()) };
        Ok(Self { files, loaded: Mutex::new(loaded) })
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The certificate. Now and then, has one other thread look at the files: a file system may not
    /// answer.
    fn config(self: &Arc<Self>) -> Arc<ServerConfig> {
        let mut loaded = self.loaded();
        if loaded.looked_at.take_if(|at| at.elapsed() >= LOOK_INTERVAL).is_some() {
            let tls = Arc::clone(self);
            tokio::task::spawn_blocking(move || {
                tls.look();
                tls.loaded().looked_at = Some(Instant::now());
            });
        }
        Arc::clone(&loaded.config)
    }

    /// Reads the files if they have changed. Files that cannot be used leave the earlier certificate.
    fn look(&self) {
        let stamps = self.files.stamps();
        if stamps == self.loaded().stamps {
            return;
        }
        let result = self.files.load();
        let mut loaded = self.loaded();
        match result {
            Ok(config) => {
                (loaded.config, loaded.stamps, loaded.warned) = (config, stamps, None);
                tracing::info!("E2B's API has the changed certificate");
            }
            Err(error) => {
                // A file that could not be read is tried again.
                if !matches!(error, TlsError::File { .. }) {
                    loaded.stamps = stamps;
                }
                if loaded.warned.replace(stamps) != Some(stamps) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "the certificate of E2B's API has changed, and the earlier one stays");
                }
            }
        }
    }

    /// Makes the handshake with a client. None if the client makes none.
    pub(crate) async fn accept(self: &Arc<Self>, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(self.config());
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%error, "a handshake with E2B's API");
                None
            }
            Err(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
