//! Connections to the agent, and requests on them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use clade_agent_proto::forward::{self, MAX_REPLY, Reply};
use clade_agent_proto::{MAX_MESSAGE, TOKEN_HEADER};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, HOST};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::{Client, ClientError, Socket};

/// Default timeout for a guest to accept a connection.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of one attempt. Each abandoned attempt is more work for a slow guest.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// The pause after the first attempt. Each further pause is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// The reason for an attempt without an answer in time.
const NOT_TAKEN: &str = "it does not take the connection";
/// Default timeout for the head of an answer.
pub(crate) const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum silence of the agent within an answer. Keepalives are requested at a shorter interval.
pub(crate) const SILENCE: Duration = Duration::from_secs(120);
/// Maximum length of an answer's head.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 64;
/// Maximum length of the line that answers CONNECT.
const MAX_LINE: usize = 64;

/// The address of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A port of a VM, reached through the VM's vsock socket on the host.
    Vsock {
        /// The socket.
        socket: PathBuf,
        /// The port.
        port: u32,
    },
    /// A Unix socket of the agent's own.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl Endpoint {
    fn shown(&self) -> String {
        match self {
            Self::Vsock { socket: path, .. } | Self::Unix(path) => path.display().to_string(),
            Self::Tcp(address) => address.to_string(),
        }
    }

    async fn open(&self) -> Result<Socket, ClientError> {
        let failed = |source| ClientError::Socket { at: self.shown(), source };
        Ok(match self {
            Self::Vsock { socket, port } => {
                let mut stream = Socket::from(UnixStream::connect(socket).await.map_err(failed)?);
                stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(failed)?;
                accepted(&mut stream).await?;
                stream
            }
            Self::Unix(path) => UnixStream::connect(path).await.map_err(failed)?.into(),
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                stream.into()
            }
        })
    }

    /// Connects within a time. A guest that refuses the connection, or does not answer it, may have
    /// an agent soon: the attempt is repeated until the time is over.
    ///
    /// # Errors
    /// When the socket does not exist, or the guest does not accept a connection in time.
    pub async fn connect(&self, time: Duration) -> Result<Socket, ClientError> {
        let (begun, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            let left = time.saturating_sub(begun.elapsed());
            let failed = match self.connect_once(left.min(ATTEMPT_TIMEOUT)).await {
                Err(error) if error.may_pass() => error,
                done => return done,
            };
            let waited = begun.elapsed();
            if waited >= time {
                return Err(failed.after(waited));
            }
            tokio::time::sleep(pause.min(time - waited)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Connects with one attempt of at most this time.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub async fn connect_once(&self, time: Duration) -> Result<Socket, ClientError> {
        let late = |_| ClientError::NoAgent { why: NOT_TAKEN, waited: time };
        tokio::time::timeout(time, self.open()).await.map_err(late)?
    }

    /// Connects within a time to a TCP port of the guest. The endpoint must be that of an agent's
    /// connections to ports. Later bytes belong to the port, in both directions.
    ///
    /// # Errors
    /// When there is no such agent, or no listener at the port.
    pub async fn connect_tcp(&self, port: u16, time: Duration) -> Result<Socket, ClientError> {
        let late = |_| ClientError::NoAgent { why: "it does not connect to the port in time", waited: time };
        tokio::time::timeout(time, self.open_tcp(port)).await.map_err(late)?
    }

    async fn open_tcp(&self, port: u16) -> Result<Socket, ClientError> {
        let begun = Instant::now();
        let mut stream = self.open().await?;
        let asked = stream.write_all(forward::request(port).as_bytes()).await;
        let mut line = Vec::new();
        loop {
            match stream.read_u8().await {
                Ok(b'\n') => break,
                Ok(byte) if line.len() < MAX_REPLY => line.push(byte),
                Ok(_) => return Err(ClientError::answer("the line about the port has no end")),
                // An agent without room reports that and closes, perhaps before it reads the
                // request.
                Err(_) if let Err(source) = asked => {
                    return Err(ClientError::Socket { at: self.shown(), source });
                }
                Err(_) => {
                    let why = "it ends the connection to the port";
                    return Err(ClientError::NoAgent { why, waited: begun.elapsed() });
                }
            }
        }
        match Reply::parse(&line) {
            Some(Reply::Open) => Ok(stream),
            Some(Reply::Closed(why)) => Err(ClientError::PortClosed { port, why }),
            Some(Reply::Refused(why)) => Err(ClientError::PortRefused { port, why }),
            None => Err(ClientError::answer(String::from_utf8_lossy(&line))),
        }
    }
}

/// Reads `OK`, a port and the end of the line, and no further byte: the next ones are the agent's.
async fn accepted(stream: &mut Socket) -> Result<(), ClientError> {
    let (mut line, begun) = (Vec::new(), Instant::now());
    while line.last() != Some(&b'\n') {
        let refused = ClientError::NoAgent { why: "nothing listens at its port", waited: begun.elapsed() };
        match stream.read_u8().await {
            Ok(byte) if line.len() < MAX_LINE => line.push(byte),
            Ok(_) => return Err(ClientError::answer("the line that answers CONNECT has no end")),
            Err(_) => return Err(refused),
        }
    }
    if line.starts_with(b"OK ") { Ok(()) } else { Err(ClientError::answer(String::from_utf8_lossy(&line).trim_end())) }
}

/// The progress of a body in pieces.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Pieces that the connection has accepted. Only tasks of one call access both fields, and they
    /// order no other data.
    taken: AtomicU64,
    /// Whether the connection waits for the next piece, so that the guest does not cause the delay.
    is_waiting: AtomicBool,
}

/// A request's body.
#[derive(Debug)]
pub(crate) enum Outgoing {
    Whole(Option<Bytes>),
    /// The guest may accept the pieces at any speed.
    Pieces(mpsc::Receiver<Bytes>),
    /// The guest must accept a piece, or answer, from time to time.
    Watched(mpsc::Receiver<Bytes>, Arc<Progress>),
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Pieces(pieces) => pieces.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece)))),
            Self::Watched(pieces, progress) => {
                let piece = pieces.poll_recv(cx);
                progress.is_waiting.store(piece.is_pending(), Ordering::Relaxed);
                progress.taken.fetch_add(u64::from(piece.is_ready()), Ordering::Relaxed);
                piece.map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
            }
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Whole(bytes) => http_body::SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Pieces(_) | Self::Watched(..) => http_body::SizeHint::default(),
        }
    }
}

/// The task of a connection, which ends with it.
#[derive(Debug)]
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer whose body is still to come, and its connection.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    _driver: Driver,
}

impl Answer {
    /// The next bytes; `None` at the end.
    pub(crate) async fn piece(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let body = self.response.body_mut();
            let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
            let Some(frame) = within(SILENCE, frame).await? else { return Ok(None) };
            if let Ok(data) = frame.map_err(ClientError::of_connection)?.into_data()
                && !data.is_empty()
            {
                return Ok(Some(data));
            }
        }
    }

    /// All of the body, up to the limit of a message. The timeout also cuts off a guest that sends
    /// it byte by byte.
    pub(crate) async fn whole(&mut self) -> Result<Vec<u8>, ClientError> {
        self.whole_of(MAX_MESSAGE).await
    }

    /// The same, up to `most` bytes.
    pub(crate) async fn whole_of(&mut self, most: usize) -> Result<Vec<u8>, ClientError> {
        within(SILENCE, self.pieces(most)).await?
    }

    async fn pieces(&mut self, most: usize) -> Result<Vec<u8>, ClientError> {
        let mut bytes = Vec::new();
        while let Some(piece) = self.piece().await? {
            if bytes.len() + piece.len() > most {
                return Err(ClientError::answer(format_args!("more than {most} bytes")));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

pub(crate) async fn within<T>(time: Duration, work: impl Future<Output = T>) -> Result<T, ClientError> {
    tokio::time::timeout(time, work).await.map_err(|_| ClientError::Silent { time })
}

/// Waits as long as the guest accepts pieces.
async fn progressing<T>(progress: &Progress, work: impl Future<Output = T>) -> Result<T, ClientError> {
    let mut work = std::pin::pin!(work);
    let mut taken = 0;
    loop {
        if let Ok(done) = tokio::time::timeout(SILENCE, &mut work).await {
            return Ok(done);
        }
        let now = progress.taken.load(Ordering::Relaxed);
        let is_waiting = progress.is_waiting.load(Ordering::Relaxed);
        if std::mem::replace(&mut taken, now) == now && !is_waiting {
            return Err(ClientError::Silent { time: SILENCE });
        }
    }
}

impl Client {
    /// A request with the common headers.
    pub(crate) fn request(&self, method: &str, path: &str) -> hyper::http::request::Builder {
        let mut request = Request::builder().method(method).uri(path).header(HOST, "agent");
        if let Some(user) = &self.user {
            request = request.header(AUTHORIZATION, format!("Basic {}", STANDARD.encode(format!("{user}:"))));
        }
        if let Some(token) = &self.token {
            request = request.header(TOKEN_HEADER, token);
        }
        request
    }

    pub(crate) fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Sends a request. There is no timeout for the answer to a body in pieces, unless it is
    /// watched.
    pub(crate) async fn send(&self, request: Request<Outgoing>) -> Result<Answer, ClientError> {
        let is_piecewise = matches!(request.body(), Outgoing::Pieces(_));
        let progress = match request.body() {
            Outgoing::Watched(_, progress) => Some(Arc::clone(progress)),
            _ => None,
        };
        let stream = match self.tries_once {
            true => self.endpoint.connect_once(self.connecting).await?,
            false => self.endpoint.connect(self.connecting).await?,
        };
        let mut http = http1::Builder::new();
        http.max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
        let (mut sender, connection) =
            http.handshake(TokioIo::new(stream)).await.map_err(ClientError::of_connection)?;
        let driver = Driver(tokio::spawn(async move {
            // The waiter for the answer reports the connection's error.
            let _ = connection.await;
        }));
        let answer = sender.send_request(request);
        let response = match progress {
            Some(progress) => progressing(&progress, answer).await?,
            None if is_piecewise => answer.await,
            None => within(self.answering, answer).await?,
        };
        let response = response.map_err(ClientError::of_connection)?;
        Ok(Answer { response, _driver: driver })
    }
}
