//! A client of VMs' control sockets.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::task::{JoinError, JoinSet};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use crate::control::api::VmInfo;
use crate::fleet::{check_name, runtime_dir, socket_path, supervisor_path};

/// VMs that are asked at a time when all are listed.
const MAX_ASKED: usize = 16;
/// How long each may take. One that is stopped by a debugger holds up the list no longer. A process
/// whose connections are all idle takes 10 s to cut one.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);

/// Why a request to a VM failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is no socket of that name.
    #[error("there is no VM {name:?} (no socket {})", path.display())]
    NoSuchVm {
        /// The VM's name.
        name: String,
        /// The socket's path.
        path: PathBuf,
    },
    /// There is a socket, but no process listens on it.
    #[error("the process of {name:?} has died: nobody answers at {}", path.display())]
    Dead {
        /// The VM's name.
        name: String,
        /// The socket's path.
        path: PathBuf,
    },
    /// No supervisor answers.
    #[error("nobody supervises the VMs: start `clade serve` (no answer at {})", path.display())]
    NoSupervisor {
        /// Its socket's path.
        path: PathBuf,
    },
    /// The socket is another user's.
    #[error("the VM {name:?} is another user's: {} may not be opened", path.display())]
    Forbidden {
        /// The VM's name.
        name: String,
        /// The socket's path.
        path: PathBuf,
    },
    /// The name has characters that a name cannot have, or is too long.
    #[error(transparent)]
    Name(#[from] crate::fleet::FleetError),
    /// The socket failed.
    #[error("the control socket of {name:?} failed")]
    Socket {
        /// The VM's name.
        name: String,
        /// The socket's error.
        #[source]
        source: io::Error,
    },
    /// The HTTP connection failed.
    #[error("the VM's process did not answer")]
    Http(#[from] hyper::Error),
    /// The answer is not of the expected form.
    #[error("the VM's answer could not be read")]
    Answer(#[from] serde_json::Error),
    /// The VM's process refuses the request.
    #[error("{error}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The server's message.
        error: String,
    },
    /// The runtime directory cannot be read.
    #[error("{} cannot be read", path.display())]
    Directory {
        /// The directory's path.
        path: PathBuf,
        /// The error of reading it.
        #[source]
        source: io::Error,
    },
}

impl ClientError {
    /// The error for a socket of `name` at `path` that cannot be connected to.
    #[must_use]
    pub fn unreachable(name: &str, path: PathBuf, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NoSuchVm { name, path },
            io::ErrorKind::ConnectionRefused => Self::Dead { name, path },
            io::ErrorKind::PermissionDenied => Self::Forbidden { name, path },
            _ => Self::Socket { name, source },
        }
    }
}

/// The VMs that answer.
#[derive(Clone, Debug, Default)]
pub struct ListedVms {
    /// Those of this user.
    pub vms: Vec<VmInfo>,
    /// How many sockets are another user's.
    pub forbidden: usize,
}

type Answered = (Result<Result<VmInfo, ClientError>, Elapsed>, String);

impl ListedVms {
    fn extend(&mut self, answer: Option<Result<Answered, JoinError>>) {
        match answer {
            Some(Ok((Ok(Ok(info)), _))) => self.vms.push(info),
            Some(Ok((Ok(Err(ClientError::Forbidden { .. })), _))) => self.forbidden += 1,
            // It has ended meanwhile, or a dead process has left its socket.
            Some(Ok((Ok(Err(error)), name))) => tracing::debug!(%error, name, "does not answer"),
            Some(Ok((Err(_), name))) => tracing::warn!(name, "does not answer within {LIST_TIMEOUT:?}"),
            Some(Err(error)) => tracing::warn!(%error, "a VM is left out"),
            None => {}
        }
    }
}

/// Sends requests to VMs by name.
#[derive(Clone, Debug)]
pub struct Client {
    dir: PathBuf,
}

impl Default for Client {
    fn default() -> Self {
        Self { dir: runtime_dir() }
    }
}

impl Client {
    /// A client for the VMs with their sockets in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }

    /// The directory of the sockets.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Sends a request to the process of `name`.
    ///
    /// # Errors
    /// When it cannot be reached, or refuses.
    pub async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        name: &str,
        action: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        check_name(name)?;
        let path = socket_path(&self.dir, name);
        let stream = UnixStream::connect(&path).await;
        let stream = stream.map_err(|source| ClientError::unreachable(name, path, source))?;
        exchange(stream, method, name, &format!("/v1/vms/{name}{action}"), body).await
    }

    /// Sends a request to the supervisor.
    ///
    /// # Errors
    /// When there is none, or it refuses.
    pub async fn supervisor<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let path = supervisor_path(&self.dir);
        let stream = match UnixStream::connect(&path).await {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(ClientError::NoSupervisor { path });
            }
            other => other.map_err(|source| ClientError::Socket { name: "the supervisor".to_owned(), source })?,
        };
        exchange(stream, method, "the supervisor", uri, body).await
    }

    /// All VMs of this user that answer.
    ///
    /// # Errors
    /// When the directory of sockets cannot be read.
    pub async fn list(&self) -> Result<ListedVms, ClientError> {
        let failed = |source| ClientError::Directory { path: self.dir.clone(), source };
        let entries = match std::fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(ListedVms::default()),
            other => other.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.file_name();
            names.extend(file.to_str().and_then(|f| f.strip_suffix(".sock")).map(str::to_owned));
        }
        names.sort_unstable();
        let mut all = ListedVms::default();
        let mut asked = JoinSet::new();
        for name in names {
            if asked.len() >= MAX_ASKED {
                all.extend(asked.join_next().await);
            }
            let client = self.clone();
            asked.spawn(async move {
                let answer = client.request::<VmInfo>(Method::GET, &name, "", None::<&()>);
                (timeout(LIST_TIMEOUT, answer).await, name)
            });
        }
        while let Some(answer) = asked.join_next().await {
            all.extend(Some(answer));
        }
        all.vms.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }
}

/// Sends one request over a connection.
async fn exchange<T: DeserializeOwned>(
    stream: UnixStream,
    method: Method,
    name: &str,
    uri: &str,
    body: Option<&(impl Serialize + Sync)>,
) -> Result<T, ClientError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .header("host", "clade")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| ClientError::Socket { name: name.to_owned(), source: io::Error::other(e) })?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let bytes = response.into_body().collect().await?.to_bytes();
    connection.abort();
    if status != StatusCode::OK {
        #[derive(serde::Deserialize)]
        struct Refusal {
            error: String,
        }
        let error = serde_json::from_slice::<Refusal>(&bytes).map_or_else(|_| status.to_string(), |r| r.error);
        return Err(ClientError::Refused { status: status.as_u16(), error });
    }
    Ok(serde_json::from_slice(&bytes)?)
}
