//! A client of VMs' control sockets.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_agent_client::Socket;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};

use crate::{Token, VmInfo, check_name, runtime_dir, socket_path, supervisor_path};

mod error;
mod list;
mod memory;
mod retry;
mod stop;

pub use error::ClientError;
pub use list::ListedVms;
pub use retry::{MAX_ATTEMPTS, retried};

/// Most bytes of an answer. A map of pages has up to four million.
pub const MAX_ANSWER: usize = 16 << 20;
/// The same of the information of one VM in a list.
const MAX_LISTED: usize = 1 << 20;
/// Interval of the attempts to connect to a process that accepts no connection.
const CONNECT_POLL: Duration = Duration::from_millis(50);

/// A supervisor behind a TCP port.
#[derive(Clone, Debug)]
struct Remote {
    api: String,
    token_file: Option<PathBuf>,
}

/// Sends requests to VMs by name.
#[derive(Clone, Debug)]
pub struct Client {
    dir: PathBuf,
    remote: Option<Remote>,
    /// Most attempts of a request.
    attempts: u32,
}

impl Default for Client {
    /// A client for the supervisor at `$CLADE_API` if that is set, else for the VMs of this user's
    /// runtime directory.
    fn default() -> Self {
        let of = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let remote = of("CLADE_API").map(|api| Remote {
            api: api.to_string_lossy().into_owned(),
            token_file: of("CLADE_TOKEN_FILE").map(PathBuf::from),
        });
        Self { dir: runtime_dir(), remote, attempts: MAX_ATTEMPTS }
    }
}

impl Remote {
    async fn connect(&self) -> Result<(Socket, Token), ClientError> {
        let address = self.api.strip_prefix("tcp://").and_then(|address| address.parse().ok());
        let address: SocketAddr = address.ok_or_else(|| ClientError::Address { value: self.api.clone() })?;
        let token = Token::read(self.token_file.as_deref().ok_or(ClientError::NoToken)?)?;
        let stream = TcpStream::connect(address).await;
        Ok((stream.map_err(|source| ClientError::NoAnswer { address, source })?.into(), token))
    }
}

impl Client {
    /// A client for the VMs with their sockets in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), remote: None, attempts: 1 }
    }

    /// Has requests repeated whose refusal may be temporary: if nothing was done, or if the request
    /// changes nothing.
    #[must_use]
    pub fn with_retries(self) -> Self {
        Self { attempts: MAX_ATTEMPTS, ..self }
    }

    /// Returns whether it asks a supervisor behind a TCP port.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.remote.is_some()
    }

    /// Returns the directory of the sockets.
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
        retried(self.attempts, &method, || self.request_once(method.clone(), name, action, body)).await
    }

    async fn request_once<T: DeserializeOwned>(
        &self,
        method: Method,
        name: &str,
        action: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        check_name(name)?;
        if self.is_remote() {
            return self.supervisor_once(method, &format!("/v1/vms/{name}{action}"), body).await;
        }
        exchange(self.connect(name).await?, None, method, &format!("/v1/vms/{name}{action}"), body, MAX_ANSWER).await
    }

    /// Returns the information of a VM for a list. One that is longer than any honest process's is refused: a list keeps
    /// those of all VMs.
    pub(crate) async fn listed(&self, name: &str) -> Result<VmInfo, ClientError> {
        if self.is_remote() {
            return self.request(Method::GET, name, "", None::<&()>).await;
        }
        check_name(name)?;
        let once = || async {
            let (socket, uri) = (self.connect(name).await?, format!("/v1/vms/{name}"));
            exchange(socket, None, Method::GET, &uri, None::<&()>, MAX_LISTED).await
        };
        retried(self.attempts, &Method::GET, once).await
    }

    /// Connects to the process of `name`.
    async fn connect(&self, name: &str) -> Result<Socket, ClientError> {
        let path = socket_path(&self.dir, name);
        let connected = connected_to(&path).await;
        connected.map(Into::into).map_err(|source| ClientError::unreachable(name, path, source))
    }

    /// Sends a request to the process of `name`, which has `limit` to answer.
    ///
    /// # Errors
    /// As for any request. [`ClientError::Silent`] when the time is over.
    pub async fn request_within<T: DeserializeOwned>(
        &self,
        limit: Duration,
        method: Method,
        name: &str,
        action: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let answer = timeout(limit, self.request(method, name, action, body)).await;
        answer.unwrap_or_else(|_| Err(ClientError::Silent { name: name.to_owned(), seconds: limit.as_secs() }))
    }

    /// Sends a request for one VM to the supervisor. `action` is empty, or a path below the VM's.
    ///
    /// # Errors
    /// As for [`Self::supervisor`].
    pub async fn of_vm<T: DeserializeOwned>(
        &self,
        method: Method,
        name: &str,
        action: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        check_name(name)?;
        self.supervisor(method, &format!("/v1/vms/{name}{action}"), body).await
    }

    /// The same for one checkpoint.
    ///
    /// # Errors
    /// As for [`Self::supervisor`].
    pub async fn of_checkpoint<T: DeserializeOwned>(
        &self,
        method: Method,
        name: &str,
        action: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        check_name(name)?;
        self.supervisor(method, &format!("/v1/checkpoints/{name}{action}"), body).await
    }

    /// Sends a request to the supervisor. The path consists of names alone: the server would decode
    /// an escape and cut off a query, so that another request than the caller's would arrive.
    ///
    /// # Errors
    /// When there is no supervisor, or it refuses. When the path has anything but names in it.
    pub async fn supervisor<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        check_path(uri)?;
        retried(self.attempts, &method, || self.supervisor_once(method.clone(), uri, body)).await
    }

    async fn supervisor_once<T: DeserializeOwned>(
        &self,
        method: Method,
        uri: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        if let Some(remote) = &self.remote {
            let (stream, token) = remote.connect().await?;
            return exchange(stream, Some(&token), method, uri, body, MAX_ANSWER).await;
        }
        exchange(self.connect_supervisor().await?, None, method, uri, body, MAX_ANSWER).await
    }

    /// Follows the supervisor's events, until it ends or `each` returns false. Passes the data of
    /// each event to `each`: JSON in one line.
    ///
    /// # Errors
    /// When there is no supervisor, or it refuses.
    pub async fn follow(&self, mut each: impl FnMut(&str) -> bool) -> Result<(), ClientError> {
        let mut body = self.body_of(None, "/v1/events").await?;
        tracing::debug!("events are followed");
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            bytes.extend_from_slice(&frame?.into_data().unwrap_or_default());
            while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = bytes.drain(..=end).collect();
                let data = std::str::from_utf8(&line).ok().and_then(|line| line.strip_prefix("data: "));
                if data.is_some_and(|data| !each(data.trim_end())) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Follows the serial console of `name`. Passes its last output to `each`, and then further output,
    /// until the VM ends or `each` returns false.
    ///
    /// # Errors
    /// As for [`Self::request`]; [`ClientError::Http`] when the connection breaks off.
    pub async fn follow_console(&self, name: &str, mut each: impl FnMut(&[u8]) -> bool) -> Result<(), ClientError> {
        check_name(name)?;
        let mut body = self.body_of(Some(name), &format!("/v1/vms/{name}/console")).await?;
        while let Some(frame) = body.frame().await {
            if !each(&frame?.into_data().unwrap_or_default()) {
                break;
            }
        }
        Ok(())
    }

    /// Returns the body of an answer of the process of `name`, or of the supervisor, as it comes.
    async fn body_of(&self, name: Option<&str>, uri: &str) -> Result<Incoming, ClientError> {
        let (stream, token) = match (&self.remote, name) {
            (Some(remote), _) => remote.connect().await.map(|(stream, token)| (stream, Some(token)))?,
            (None, Some(name)) => (self.connect(name).await?, None),
            (None, None) => (self.connect_supervisor().await?, None),
        };
        send(stream, token.as_ref(), Method::GET, uri, Payload::json(None::<&()>)?).await
    }

    async fn connect_supervisor(&self) -> Result<Socket, ClientError> {
        let path = supervisor_path(&self.dir);
        match connected_to(&path).await {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Err(ClientError::NoSupervisor { path })
            }
            Ok(stream) => Ok(stream.into()),
            Err(source) => Err(ClientError::Socket { name: "the supervisor".to_owned(), source }),
        }
    }
}

/// Checks that a path consists of names. The error has the part that is not a name.
fn check_path(path: &str) -> Result<(), ClientError> {
    let names = path.strip_prefix('/').unwrap_or(path);
    names.split('/').try_for_each(|name| Ok(check_name(name)?))
}

/// A body, and its media type.
struct Payload {
    bytes: Bytes,
    media: &'static str,
}

impl Payload {
    fn json(body: Option<&(impl Serialize + Sync)>) -> Result<Self, ClientError> {
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        Ok(Self { bytes: bytes.into(), media: "application/json" })
    }
}

/// Sends one request over a connection, and returns its answer.
async fn exchange<T: DeserializeOwned>(
    stream: Socket,
    token: Option<&Token>,
    method: Method,
    uri: &str,
    body: Option<&(impl Serialize + Sync)>,
    most: usize,
) -> Result<T, ClientError> {
    let bytes = whole(send(stream, token, method, uri, Payload::json(body)?).await?, most).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Reads a body. Its sender may be compromised, so its length is bounded.
async fn whole(body: Incoming, most: usize) -> Result<Bytes, ClientError> {
    match Limited::new(body, most).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => match error.downcast::<hyper::Error>() {
            Ok(error) => Err(ClientError::Http(*error)),
            Err(_) => Err(ClientError::LongAnswer { most }),
        },
    }
}

/// Sends one request over a connection, and returns the body of its answer.
async fn send(
    stream: Socket,
    token: Option<&Token>,
    method: Method,
    uri: &str,
    payload: Payload,
) -> Result<Incoming, ClientError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // The connection ends when the answer has been read, or is dropped.
    tokio::spawn(connection);
    let request =
        Request::builder().method(method).uri(uri).header("host", "localhost").header("content-type", payload.media);
    let request = token.iter().fold(request, |request, token| request.header("authorization", token.header()));
    let request = request
        .body(Full::new(payload.bytes))
        .map_err(|e| ClientError::Socket { name: uri.to_owned(), source: io::Error::other(e) })?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    if status != StatusCode::OK {
        let bytes = whole(response.into_body(), MAX_ANSWER).await?;
        return Err(ClientError::refused(status, &bytes));
    }
    Ok(response.into_body())
}

/// Connects to a socket. While its backlog is full, it waits, as a blocking connect would.
async fn connected_to(path: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(CONNECT_POLL).await,
            connected => return connected,
        }
    }
}

#[cfg(test)]
mod tests;
