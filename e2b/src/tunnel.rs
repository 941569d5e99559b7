//! Connections that leave HTTP after an answer: WebSockets.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, split};

/// Time that one direction may go on when the other has ended. A WebSocket has already been closed
/// by then.
const LINGER: Duration = Duration::from_secs(10);

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

/// Copies both directions until either has ended and the other is drained.
pub(crate) async fn relay(client: impl AsyncRead + AsyncWrite, guest: impl AsyncRead + AsyncWrite) {
    let ((mut from_client, mut to_client), (mut from_guest, mut to_guest)) = (split(client), split(guest));
    // Errors and late bytes are dropped: both ends are done.
    let mut up = std::pin::pin!(async {
        if copy(&mut from_client, &mut to_guest).await.is_ok() {
            let _ = to_guest.shutdown().await;
        }
    });
    let mut down = std::pin::pin!(async {
        if copy(&mut from_guest, &mut to_client).await.is_ok() {
            let _ = to_client.shutdown().await;
        }
    });
    tokio::select! {
        () = &mut up => drop(tokio::time::timeout(LINGER, down).await),
        () = &mut down => drop(tokio::time::timeout(LINGER, up).await),
    }
}
