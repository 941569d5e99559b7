//! Listeners and connections.

use std::convert::Infallible;
use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::agent::Agent;
use crate::connection::{Connection, Peer};
use crate::log::log;
use crate::options::Options;
use crate::route::route;

/// Connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 2048;
/// Maximum idle time of a connection, and timeout for the head of a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
const MAX_HEADERS: usize = 64;
/// Maximum length of a head, and about as many buffered bytes of an answer.
const MAX_BUFFER: usize = 64 << 10;
/// Delay before the next attempt when there are no descriptors.
pub(crate) const RETRY: Duration = Duration::from_millis(200);

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// vsock.
    Vsock(VsockListener),
    /// A Unix socket.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Opens the listeners of `options`.
    ///
    /// # Errors
    /// When an address cannot be listened on.
    pub async fn open(options: &Options) -> io::Result<Vec<Self>> {
        let mut listeners = Vec::new();
        if let Some(port) = options.vsock {
            listeners.push(Self::vsock(port)?);
        }
        if let Some(path) = &options.unix {
            listeners.push(Self::unix(path)?);
        }
        if let Some(address) = options.tcp {
            listeners.push(Self::Tcp(TcpListener::bind(address).await?));
        }
        Ok(listeners)
    }

    /// Opens the listener for connections to ports of the guest.
    pub(crate) fn open_forward(options: &Options) -> io::Result<Option<Self>> {
        match (&options.forward_unix, options.forward_vsock) {
            (Some(path), _) => Self::unix(path).map(Some),
            (None, Some(port)) => Self::vsock(port).map(Some),
            (None, None) => Ok(None),
        }
    }

    fn vsock(port: u32) -> io::Result<Self> {
        Ok(Self::Vsock(VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?))
    }

    fn unix(path: &Path) -> io::Result<Self> {
        // A socket left behind by an earlier agent.
        if std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        {
            std::fs::remove_file(path)?;
        }
        let listener = StdUnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(UnixListener::from_std(listener)?))
    }

    pub(crate) async fn accept(&self) -> io::Result<(Box<dyn Stream>, Peer)> {
        Ok(match self {
            Self::Vsock(listener) => {
                let (stream, from) = listener.accept().await?;
                let peer = if from.cid() == VMADDR_CID_HOST { Peer::Trusted } else { Peer::Other };
                (Box::new(stream), peer)
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let uid = stream.peer_cred()?.uid();
                let is_own = uid == 0 || uid == rustix::process::geteuid().as_raw();
                (Box::new(stream), if is_own { Peer::Trusted } else { Peer::Other })
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                (Box::new(stream), Peer::Other)
            }
        })
    }
}

/// A connection of any kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Serves all listeners, for ever.
pub async fn serve(agent: Arc<Agent>, listeners: Vec<Listener>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut tasks = tokio::task::JoinSet::new();
    for listener in listeners {
        tasks.spawn(accept(Arc::clone(&agent), listener, Arc::clone(&room)));
    }
    while tasks.join_next().await.is_some() {}
}

async fn accept(agent: Arc<Agent>, listener: Listener, room: Arc<Semaphore>) {
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&room).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                log!("a connection cannot be accepted: {error}");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            connection(agent, stream, peer).await;
            drop(place);
        });
    }
}

async fn connection(agent: Arc<Agent>, stream: Box<dyn Stream>, peer: Peer) {
    let mut generation = agent.generation.subscribe();
    let own = Connection { peer, is_kept: Arc::default() };
    let is_kept = Arc::clone(&own.is_kept);
    let service = service_fn(move |request| {
        let (agent, own) = (Arc::clone(&agent), own.clone());
        async move { Ok::<_, Infallible>(route(agent, own, request).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT).max_headers(MAX_HEADERS).max_buf_size(MAX_BUFFER);
    let mut served = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    loop {
        tokio::select! {
            // An error caused by the client ends the connection, and is not reported.
            _ = &mut served => return,
            changed = generation.changed() => {
                if changed.is_err() || !is_kept.swap(false, Ordering::Relaxed) {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// Its client would keep a permit, of which there are few.
    #[tokio::test(start_paused = true)]
    async fn a_message_that_comes_byte_by_byte_is_given_up() {
        let agent = Agent::new().unwrap();
        let all = agent.large.available_permits();
        let whole = ("List", "application/json", vec![b' '; 20_000]);
        let stream = ("Start", "application/connect+json", vec![0, 0, 0, 0x80, 0]);
        for (method, media_type, body) in [whole, stream] {
            let (mut client, ours) = tokio::io::duplex(1 << 16);
            tokio::spawn(connection(Arc::clone(&agent), Box::new(ours), Peer::Trusted));
            let head = format!(
                "POST /process.Process/{method} HTTP/1.1\r\nhost: a\r\ncontent-type: {media_type}\r\n\
                 content-length: 30000\r\n\r\n"
            );
            client.write_all(&[head.into_bytes(), body].concat()).await.unwrap();
            sleep(Duration::from_secs(1)).await;
            assert_eq!(agent.large.available_permits(), all - 1, "{method}");
            let begun = Instant::now();
            while agent.large.available_permits() < all {
                sleep(Duration::from_secs(50)).await;
                assert!(begun.elapsed() < Duration::from_secs(500), "{method}");
                // Its connection may have ended.
                let _ = client.write_all(b" ").await;
            }
        }
    }
}
