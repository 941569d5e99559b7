//! Entry points of fuzz targets, unused in a guest.

use std::io;

use tokio::io::AsyncRead;

/// Reads the line at the beginning of a connection to a port, without its end, and no byte after
/// it.
///
/// # Errors
/// When the line does not end, or is too long.
pub async fn first_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    crate::forward::first_line(stream).await
}
