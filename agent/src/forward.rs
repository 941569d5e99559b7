//! Connections of the host to TCP ports of this guest.
//!
//! A connection begins with a line that contains a port (`clade_agent_proto::forward`). Then bytes
//! are copied both ways. The target is an address of the loopback interface, so connections reach
//! this guest only.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use clade_agent_proto::forward::{MAX_REQUEST, Reply, parse_request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::agent::Agent;
use crate::connection::Peer;
use crate::listen::{Listener, RETRY, Stream};
use crate::log::log;

/// Maximum number of connections: half of those of the VM's device, so that the agent itself can
/// still be reached.
const MAX_FORWARDS: usize = 512;
/// Timeout for the first line, and for a port to accept the connection.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum idle time after one direction has ended. The host may have disconnected, which the
/// kernel reports only to a writer.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(600);
/// Buffered bytes of each direction.
const BUFFER: usize = 16 << 10;

/// Accepts connections for ever.
pub(crate) async fn serve(agent: Arc<Agent>, listener: Listener) {
    let room = Arc::new(Semaphore::new(MAX_FORWARDS));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                log!("a connection to a port cannot be accepted: {error}");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let (agent, place) = (Arc::clone(&agent), Arc::clone(&room).try_acquire_owned());
        if peer != Peer::Trusted {
            continue;
        }
        match place {
            Ok(place) => drop(tokio::spawn(async move {
                forward(&agent, stream).await;
                drop(place);
            })),
            // In a task, so that a slow refusal does not delay the host. The line is shorter than
            // any buffer.
            Err(_) => drop(tokio::spawn(refuse(stream))),
        }
    }
}

async fn refuse(mut stream: Box<dyn Stream>) {
    let line = Reply::Refused(format!("{MAX_FORWARDS} connections to ports are open")).line();
    let _ = tokio::time::timeout(LINE_TIMEOUT, stream.write_all(line.as_bytes())).await;
}

/// Serves one connection, until both its directions have ended, or the VM is another.
async fn forward(agent: &Agent, mut stream: Box<dyn Stream>) {
    let mut generation = agent.generation.subscribe();
    let forwarded = async {
        let line = tokio::time::timeout(LINE_TIMEOUT, first_line(&mut stream)).await??;
        let connected = match parse_request(&line) {
            Some(port) => connect(port).await,
            None => Err(Reply::Refused("the line names no port".to_owned())),
        };
        let (reply, guest) = match connected {
            Ok(guest) => (Reply::Open, Some(guest)),
            Err(reply) => (reply, None),
        };
        tokio::time::timeout(LINE_TIMEOUT, stream.write_all(reply.line().as_bytes())).await??;
        match guest {
            Some(guest) => relay(stream, guest, HALF_CLOSED_TIMEOUT).await,
            None => Ok(()),
        }
    };
    tokio::select! {
        // An error of either side ends the connection, and is not reported.
        _ = forwarded => {}
        _ = generation.changed() => {}
    }
}

/// The first line, without its end. Read byte by byte, because the later bytes belong to the port.
pub(crate) async fn first_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(line),
            byte if line.len() < MAX_REQUEST => line.push(byte),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Connects to a port of the loopback interface, by IPv4 and then by IPv6.
async fn connect(port: u16) -> Result<TcpStream, Reply> {
    let mut why = format!("nothing listens at port {port}");
    for address in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let connecting = TcpStream::connect(SocketAddr::new(address, port));
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => {
                // Small writes of a program are forwarded at once.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            // A guest may have no IPv6.
            Ok(Err(_)) if address.is_ipv6() => {}
            Ok(Err(error)) => why = format!("port {port}: {error}"),
            Err(_) => why = format!("port {port} does not take the connection within {CONNECT_TIMEOUT:?}"),
        }
    }
    Err(Reply::Closed(why))
}

/// The progress of a connection. Accessed by one thread's tasks, without ordering any other data.
#[derive(Debug, Default)]
struct Progress {
    bytes: AtomicU64,
    is_half: AtomicBool,
}

/// Copies one direction to its end, and shuts it down on the other side. A slow reader slows its
/// writer.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    progress: &Progress,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        to.write_all(&buffer[..count]).await?;
        progress.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }
    progress.is_half.store(true, Ordering::Relaxed);
    to.shutdown().await
}

/// Copies both directions until both have ended, one has failed, or one has and the other is idle.
async fn relay(host: impl Stream, guest: TcpStream, idle: Duration) -> io::Result<()> {
    let progress = Progress::default();
    let (from_host, to_host) = tokio::io::split(host);
    let (from_guest, to_guest) = guest.into_split();
    let watch = async {
        let (mut was_half, mut last) = (false, 0);
        loop {
            tokio::time::sleep(idle).await;
            let bytes = progress.bytes.load(Ordering::Relaxed);
            let is_half = progress.is_half.load(Ordering::Relaxed);
            if was_half && bytes == last {
                return;
            }
            (was_half, last) = (is_half, bytes);
        }
    };
    let (up, down) = (pump(from_host, to_guest, &progress), pump(from_guest, to_host, &progress));
    tokio::select! {
        copied = async { tokio::try_join!(up, down) } => copied.map(drop),
        () = watch => Err(io::ErrorKind::TimedOut.into()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    #[tokio::test]
    async fn one_that_is_half_closed_and_idle_ends() {
        let limit = Duration::from_secs(120);
        let _watchdog = clade_test_support::Watchdog::new(limit, || "a half-closed connection stays".to_owned());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let guest = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let (mut host, stream) = UnixStream::pair().unwrap();
        let relayed = tokio::spawn(relay(stream, guest, Duration::from_millis(50)));
        // An idle connection stays open.
        tokio::time::sleep(Duration::from_millis(300)).await;
        host.write_all(b"still here").await.unwrap();
        host.shutdown().await.unwrap();
        let mut read = Vec::new();
        server.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"still here");
        let ended = relayed.await.unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
