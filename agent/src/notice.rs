//! Notices to the host: that the agent is reachable, and how the entrypoint has ended. They are
//! those of `sd_notify`, to a port that Clade's socket device answers. Another host refuses the
//! connection.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::log::log;

/// The port of the host.
const PORT: u32 = clade_agent_proto::NOTICE_PORT;
/// Time limit of a notice: the guest does not wait longer for a host that does not read it.
const LIMIT: Duration = Duration::from_secs(5);

/// Sends a notice, and waits until the host has it.
pub(crate) async fn send(lines: &str) {
    let sent = timeout(LIMIT, deliver(lines)).await;
    // Other hosts do not listen, and a guest may have no socket device.
    match sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(()) => {}
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused) => {}
        Err(error) => log!("a notice does not reach the host: {error}"),
    }
}

async fn deliver(lines: &str) -> io::Result<()> {
    let mut stream = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, PORT)).await?;
    stream.write_all(lines.as_bytes()).await?;
    stream.shutdown(std::net::Shutdown::Write)?;
    // The host ends the connection when it has all of it.
    let mut end = [0; 1];
    stream.read(&mut end).await.map(drop)
}
