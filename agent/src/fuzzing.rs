//! What fuzz targets reach, and no guest needs.

use std::io;

use tokio::io::AsyncRead;

/// Reads the line that a connection to a port begins with, without its end, and nothing behind it.
///
/// # Errors
/// When it does not end, or is too long.
pub async fn first_line(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    crate::forward::first_line(stream).await
}
