//! Listening on the control sockets: limits, timeouts, and a shutdown that answers open requests.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::Method;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::ApiError;
use super::guesses::Peer;
use super::large_bodies::PLACES;
use super::session::{SessionGate, authorize};
use super::stall::Stalling;
use crate::object::begins_object;
use crate::{MAX_MEMORY, ProblemKind};

/// The most connections to control sockets of the process. More wait in the kernel's backlog.
pub const MAX_CONNECTIONS: usize = 256;
/// Time limit of a request's head, and of an idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time that a client may read nothing of its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;
/// Time limit of a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest body of a request, in bytes. One that writes memory may have [`MAX_MEMORY`].
const MAX_BODY: usize = 64 << 10;
/// The most bytes that are discarded of a body that is too long, so that its sender reads the
/// answer.
const MAX_DISCARDED: usize = 16 << 20;
/// The delay after a connection could not be accepted. Retrying sooner frees no descriptors.
pub const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);
/// Time limit of clients to read the answers to open requests when the supervisor ends. All requests
/// to it are done by then, and a cut answer would look like a failure.
pub const LAST_ANSWERS_OF_ALL: Duration = Duration::from_secs(10);

/// A source of connections.
pub trait Accept: Send {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Returns the next connection. Waits if none can be accepted.
    fn next(&mut self) -> impl Future<Output = Self::Stream> + Send;

    /// Returns the address that a connection comes from, if it has one.
    fn peer(stream: &Self::Stream) -> Option<Peer>;

    /// Returns the process that has made a connection, if it is one of this host.
    fn process(stream: &Self::Stream) -> Option<ClientProcess>;
}

/// The process that has sent a request, as the kernel names it to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientProcess {
    /// Its pid.
    pub pid: u32,
}

/// Accepts connections to a TCP port.
#[derive(Debug)]
pub struct TcpAcceptor(pub tokio::net::TcpListener);

impl Accept for TcpAcceptor {
    type Stream = TcpStream;

    async fn next(&mut self) -> TcpStream {
        let mut is_failing = false;
        loop {
            match self.0.accept().await {
                Ok((stream, _)) => {
                    // An event is sent when it happens.
                    let _ = stream.set_nodelay(true);
                    return stream;
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_failing, true) {
                        tracing::warn!(%error, "TCP connections cannot be accepted");
                    }
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    fn peer(stream: &TcpStream) -> Option<Peer> {
        stream.peer_addr().ok().map(|address| Peer(address.ip()))
    }

    fn process(_: &TcpStream) -> Option<ClientProcess> {
        None
    }
}

impl Accept for Acceptor {
    type Stream = UnixStream;

    async fn next(&mut self) -> UnixStream {
        Self::next(self).await
    }

    fn peer(_: &UnixStream) -> Option<Peer> {
        None
    }

    fn process(stream: &UnixStream) -> Option<ClientProcess> {
        // 0 is a process of a namespace that this one does not see.
        let pid = stream.peer_cred().ok()?.pid()?;
        Some(ClientProcess { pid: u32::try_from(pid).ok().filter(|pid| *pid > 0)? })
    }
}

/// Accepts connections of this user and of root.
#[derive(Debug)]
pub struct Acceptor {
    listener: tokio::net::UnixListener,
    what: &'static str,
    is_failing: bool,
}

impl Acceptor {
    /// Takes over a listening socket. Logs an error and returns None if the runtime does not accept
    /// it.
    pub fn new(listener: UnixListener, what: &'static str) -> Option<Self> {
        let listener = listener.set_nonblocking(true).and_then(|()| tokio::net::UnixListener::from_std(listener));
        match listener {
            Ok(listener) => Some(Self { listener, what, is_failing: false }),
            Err(error) => {
                tracing::error!(%error, what, "no connections are accepted");
                None
            }
        }
    }

    /// Returns the next connection. Waits if none can be accepted (no descriptors). The first
    /// failure in a row is a warning.
    pub async fn next(&mut self) -> UnixStream {
        let own = rustix::process::geteuid().as_raw();
        let what = self.what;
        loop {
            let (stream, _) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    if !std::mem::replace(&mut self.is_failing, true) {
                        tracing::warn!(%error, what, "connections cannot be accepted");
                    }
                    sleep(ACCEPT_BACKOFF).await;
                    continue;
                }
            };
            self.is_failing = false;
            // The socket's mode enforces the same. This check also holds if the directory was made
            // by other means.
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == own || peer.uid() == 0 => return stream,
                Ok(peer) => tracing::warn!(uid = peer.uid(), what, "a connection of another user is refused"),
                Err(error) => tracing::warn!(%error, what, "a connection of an unknown user is refused"),
            }
        }
    }
}

/// Returns the longest body that a request may have.
fn longest_body(head: &Parts) -> usize {
    let path = head.uri.path();
    let writes_memory = head.method == Method::PUT && path.starts_with("/v1/vms/") && path.ends_with("/memory");
    if writes_memory { MAX_MEMORY } else { MAX_BODY }
}

/// Reads a request's body before its handler runs.
///
/// A server that answers and closes with unread bytes resets the connection, and the answer is
/// lost.
async fn read_body(request: Request, next: Next) -> Response {
    let (head, mut body) = request.into_parts();
    let media = head.headers.get(CONTENT_TYPE).and_then(|media| media.to_str().ok()).unwrap_or_default();
    let is_json = media.starts_with("application/json");
    let longest = longest_body(&head);
    let read = async {
        let (mut bytes, mut discarded, mut turn) = (Vec::new(), 0, None);
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            if discarded == 0 && bytes.len() + data.len() <= longest {
                if turn.is_none() && bytes.len() + data.len() > MAX_BODY {
                    turn = PLACES.take(head.uri.path()).await;
                }
                bytes.extend_from_slice(&data);
                continue;
            }
            discarded += data.len();
            if discarded > MAX_DISCARDED {
                break;
            }
        }
        Ok::<_, axum::Error>((bytes, discarded, turn))
    };
    let refused = |kind, text: String| ApiError::new(kind, text).into_response();
    match timeout(BODY_TIMEOUT, read).await {
        Ok(Ok((bytes, 0, _))) if is_json && !bytes.is_empty() && !begins_object(&bytes) => {
            refused(ProblemKind::BadRequest, "the body is no JSON object".to_owned())
        }
        Ok(Ok((bytes, 0, turn))) => {
            let answer = next.run(Request::from_parts(head, Body::from(Bytes::from(bytes)))).await;
            drop(turn);
            answer
        }
        Ok(Ok(_)) => refused(ProblemKind::BodyTooLarge, format!("a body of more than {longest} bytes")),
        Ok(Err(error)) => refused(ProblemKind::BadRequest, format!("the body cannot be read: {error}")),
        Err(_) => refused(ProblemKind::LateBody, format!("the body did not come within {} s", BODY_TIMEOUT.as_secs())),
    }
}

/// Serves one connection until its client is done or the process ends. A request that has begun is
/// answered.
async fn answer<A: Accept>(stream: A::Stream, router: Router, mut ending: watch::Receiver<bool>) {
    let (peer, process) = (A::peer(&stream), A::process(&stream));
    let stream = Stalling::new(stream, WRITE_TIMEOUT);
    let service = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        if let Some(process) = process {
            request.extensions_mut().insert(process);
        }
        service.call(request)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let served = tokio::select! {
        served = connection.as_mut() => served,
        // An error means that the sender has gone: the process ends too.
        () = async { drop(ending.wait_for(|ending| *ending).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        // The client went away, or was too slow.
        tracing::debug!(%error, "control connection");
    }
}

/// Accepts connections until it is dropped.
pub async fn accept<A: Accept>(
    mut acceptor: A,
    router: impl Fn() -> Router,
    connections: &Arc<Semaphore>,
    ending: watch::Receiver<bool>,
) {
    loop {
        let stream = acceptor.next().await;
        // Wait here before accepting another connection. The semaphore is never closed.
        let Ok(permit) = Arc::clone(connections).acquire_owned().await else { return };
        let (router, ending) = (router(), ending.clone());
        tokio::spawn(async move {
            answer::<A>(stream, router, ending).await;
            drop(permit);
        });
    }
}

/// Binds `address` for use by a runtime. Returns the bound address too: port 0 stands for a free one.
///
/// # Errors
/// When the address cannot be bound.
pub fn bind_tcp(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Has each body read before its handler runs.
pub fn with_bodies(router: Router) -> Router {
    router.layer(from_fn(read_body))
}

/// Restricts the routes to clients that show the token of `gate`. No body is read before that: slow
/// ones without a token would take the places of others.
pub fn behind_gate(router: Router, gate: Arc<SessionGate>) -> Router {
    with_bodies(router).layer(from_fn_with_state(gate, authorize))
}

/// Serves connections until `ending`, with a limit separate from that of other sockets, and then
/// answers the requests that have begun, for `LAST_ANSWERS_OF_ALL`.
pub async fn serve_http(acceptor: impl Accept, router: Router, mut ending: watch::Receiver<bool>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let receiver = ending.clone();
    tokio::select! {
        () = accept(acceptor, || router.clone(), &connections, receiver) => {}
        () = async { drop(ending.wait_for(|ending| *ending).await) } => {}
    }
    // Connections still open then are cut off.
    let _ = timeout(LAST_ANSWERS_OF_ALL, connections.acquire_many(MAX_CONNECTIONS as u32)).await.map(drop);
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, put};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::Token;

    /// A server whose paths answer "yes", and connections to it.
    struct Server {
        dir: tempfile::TempDir,
        _ending: watch::Sender<bool>,
    }

    impl Server {
        async fn start() -> Self {
            Self::start_with(with_bodies).await
        }

        async fn start_with(wrapped: impl FnOnce(Router) -> Router) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
            let acceptor = Acceptor::new(listener, "a test").unwrap();
            let yes = || async { "yes" };
            let router = Router::new().route("/", get(yes)).route("/v1/vms/web/memory", put(yes));
            let ending = watch::Sender::new(false);
            tokio::spawn(serve_http(acceptor, wrapped(router), ending.subscribe()));
            Self { dir, _ending: ending }
        }

        async fn asked(&self, head: &str, body: &[u8]) -> UnixStream {
            let mut stream = UnixStream::connect(self.dir.path().join("socket")).await.unwrap();
            let head = format!("{head} HTTP/1.1\r\nhost: clade\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(body).await.unwrap();
            stream
        }
    }

    async fn is_answered(stream: &mut UnixStream, limit: Duration) -> bool {
        let mut bytes = [0; 512];
        let read = timeout(limit, stream.read(&mut bytes)).await;
        read.is_ok_and(|got| bytes[..got.unwrap()].starts_with(b"HTTP/1.1 200 "))
    }

    const SOON: Duration = Duration::from_secs(30);
    const A_WHILE: Duration = Duration::from_millis(100);

    /// On a clock that goes on only while no task can: a starved test is not late.
    fn within(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(test);
    }

    #[test]
    fn connections_beyond_the_most_wait_until_another_has_gone() {
        within(async {
            let server = Server::start().await;
            let mut all = Vec::new();
            for _ in 0..MAX_CONNECTIONS {
                let mut stream = server.asked("GET /", b"").await;
                assert!(is_answered(&mut stream, SOON).await);
                all.push(stream);
            }
            let mut next = server.asked("GET /", b"").await;
            assert!(!is_answered(&mut next, A_WHILE).await, "it waits");
            drop(all.pop());
            assert!(is_answered(&mut next, SOON).await);
        });
    }

    #[test]
    fn no_body_is_read_before_the_token() {
        within(async {
            let server = Server::start_with(|router| {
                behind_gate(router, Arc::new(SessionGate::new(Token::of_test("0123456789abcdef"), 7777)))
            })
            .await;
            let head = "PUT /v1/vms/web/memory HTTP/1.1\r\nhost: localhost:7777\r\ncontent-length: 1000000\r\n";
            for (token, status) in [("", "401"), ("authorization: Bearer 0123456789abcdef\r\n", "200")] {
                let mut stream = UnixStream::connect(server.dir.path().join("socket")).await.unwrap();
                // Large enough to need one of few places, and never whole without the token.
                stream.write_all(format!("{head}{token}\r\n").as_bytes()).await.unwrap();
                stream.write_all(&vec![0; 2 * MAX_BODY]).await.unwrap();
                if status == "200" {
                    stream.write_all(&vec![0; 1_000_000 - 2 * MAX_BODY]).await.unwrap();
                }
                let mut answer = [0; 12];
                stream.read_exact(&mut answer).await.unwrap();
                assert_eq!(String::from_utf8_lossy(&answer), format!("HTTP/1.1 {status}"));
            }
        });
    }

    #[test]
    fn a_large_body_waits_until_few_enough_others_are_there() {
        within(async {
            let (server, path) = (Server::start().await, "PUT /v1/vms/web/memory");
            let others = PLACES.all.acquire_many(8).await.unwrap();
            let mut large = server.asked(path, &vec![0; MAX_BODY + 1]).await;
            assert!(!is_answered(&mut large, A_WHILE).await, "it waits");
            let mut small = server.asked(path, &vec![0; MAX_BODY]).await;
            assert!(is_answered(&mut small, SOON).await);
            drop(others);
            assert!(is_answered(&mut large, SOON).await);
        });
    }
}
