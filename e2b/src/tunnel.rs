//! Connections that leave HTTP after an answer: WebSockets.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};

/// Time that one direction may go on when the other has ended. A WebSocket has already been closed
/// by then.
const LINGER: Duration = Duration::from_secs(10);
/// Bytes passed on at a time.
const PIECE: usize = 16 << 10;

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The work on a connection after its last answer. As an extension of requests it keeps the
/// connection's place meanwhile, and ends with the rest.
#[derive(Clone, Default)]
pub(crate) struct Afterwards(Arc<Mutex<Option<Work>>>);

impl fmt::Debug for Afterwards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Afterwards")
    }
}

impl Afterwards {
    pub(crate) fn set(&self, work: impl Future<Output = ()> + Send + 'static) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::pin(work));
    }

    pub(crate) fn take(&self) -> Option<Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// How one direction has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// All of it was passed on.
    Complete,
    /// Its source cannot be read any more.
    Source,
    /// Its target takes no more.
    Target,
}

/// Passes bytes on until their end, which is passed on too.
async fn pass(mut source: impl AsyncRead + Unpin, mut target: impl AsyncWrite + Unpin) -> End {
    let mut bytes = vec![0; PIECE];
    loop {
        let read = match source.read(&mut bytes).await {
            Ok(0) => break,
            Ok(read) => read,
            Err(_) => return End::Source,
        };
        if target.write_all(&bytes[..read]).await.is_err() || target.flush().await.is_err() {
            return End::Target;
        }
    }
    match target.shutdown().await {
        Ok(()) => End::Complete,
        Err(_) => End::Target,
    }
}

/// Copies both directions until either has ended and the other is drained. If the client has gone
/// without an end of its own, the guest's connection ends at once; so does the client's, if the
/// guest's is broken.
pub(crate) async fn relay(client: impl AsyncRead + AsyncWrite, guest: impl AsyncRead + AsyncWrite) {
    let ((from_client, to_client), (from_guest, to_guest)) = (split(client), split(guest));
    let mut up = std::pin::pin!(pass(from_client, to_guest));
    let mut down = std::pin::pin!(pass(from_guest, to_client));
    tokio::select! {
        ended = &mut up => match ended {
            End::Source => {}
            // The guest may have answered before it closed.
            End::Complete | End::Target => drop(tokio::time::timeout(LINGER, down).await),
        },
        ended = &mut down => match ended {
            End::Source | End::Target => {}
            End::Complete => drop(tokio::time::timeout(LINGER, up).await),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::task::{Context, Poll};

    use tokio::io::{DuplexStream, ReadBuf, duplex};
    use tokio::time::Instant;

    use super::*;

    /// A stream whose reads, or writes, fail.
    struct Broken {
        reads: bool,
        inner: DuplexStream,
    }

    impl AsyncRead for Broken {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            match self.reads {
                true => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                false => Pin::new(&mut self.inner).poll_read(cx, to),
            }
        }
    }

    impl AsyncWrite for Broken {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
            match self.reads {
                true => Pin::new(&mut self.inner).poll_write(cx, from),
                false => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            }
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }
        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    }

    /// A relay between two streams, and the time that it took.
    async fn timed(client: impl AsyncRead + AsyncWrite, guest: impl AsyncRead + AsyncWrite) -> Duration {
        let begun = Instant::now();
        relay(client, guest).await;
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn each_end_is_passed_on_and_the_other_direction_drained() {
        let ((client, far_client), (guest, far_guest)) = (duplex(64), duplex(64));
        let asks = async {
            let (mut from, mut to) = split(far_client);
            to.write_all(b"ask").await.unwrap();
            to.shutdown().await.unwrap();
            let mut answer = Vec::new();
            from.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let answers = async {
            let (mut from, mut to) = split(far_guest);
            let mut asked = Vec::new();
            from.read_to_end(&mut asked).await.unwrap();
            // More than the streams hold at a time.
            to.write_all(&[7; 1000]).await.unwrap();
            to.shutdown().await.unwrap();
            asked
        };
        let (took, answer, asked) = tokio::join!(timed(client, guest), asks, answers);
        assert_eq!((asked, answer, took), (b"ask".to_vec(), vec![7; 1000], Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_connection_ends_the_other_at_once() {
        // The client was reset, or closed without the end of its TLS.
        let ((inner, _far), (guest, mut far_guest)) = (duplex(64), duplex(64));
        assert_eq!(timed(Broken { reads: true, inner }, guest).await, Duration::ZERO);
        assert_eq!(far_guest.read(&mut [0; 1]).await.unwrap(), 0);
        // The client takes nothing more.
        let ((inner, _far), (guest, mut far_guest)) = (duplex(64), duplex(64));
        far_guest.write_all(b"x").await.unwrap();
        assert_eq!(timed(Broken { reads: false, inner }, guest).await, Duration::ZERO);
        // The guest was reset.
        let ((client, mut far_client), (inner, _far)) = (duplex(64), duplex(64));
        assert_eq!(timed(client, Broken { reads: true, inner }).await, Duration::ZERO);
        assert_eq!(far_client.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_takes_nothing_more_is_read_to_its_end_and_not_for_ever() {
        let ((client, mut far_client), (inner, mut far_guest)) = (duplex(64), duplex(64));
        far_client.write_all(b"late").await.unwrap();
        far_guest.write_all(b"answer").await.unwrap();
        let took = timed(client, Broken { reads: false, inner }).await;
        let mut answer = [0; 6];
        far_client.read_exact(&mut answer).await.unwrap();
        assert_eq!((&answer, took), (b"answer", LINGER));
    }
}
