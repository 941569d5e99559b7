//! The requests of the host for a layer.

use std::io;
use std::path::Path;
use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use tokio::sync::mpsc;

use crate::agent::Agent;
use crate::http::{Answer, Reply, http_error, no_content};
use crate::layer::{Files, LayerError, Pieces, chain, write_archive};
use crate::lock::lock;
use crate::log::log;
use crate::shutdown::{GRACE, end_programs};

/// Longer than a tick of any kernel, in which all changes have the same change time.
const TICK: Duration = Duration::from_millis(50);
/// Pieces in transit.
const PIECES: usize = 2;

impl Agent {
    /// `POST /clade/layer/begin`: changes count from here on.
    pub(crate) async fn begin_layer(&self) -> Reply {
        match on_a_thread(|| Files::list(Path::new("/"))).await {
            Ok(files) => {
                *lock(&self.layer) = Some(files);
                // A change in the tick of the listing could keep its file's change time.
                tokio::time::sleep(TICK).await;
                no_content()
            }
            Err(error) => refusal(&error),
        }
    }

    /// `POST /clade/layer`: the changes since then, as an archive. All programs of the guest are ended
    /// first, so that no file changes while it is read.
    pub(crate) async fn layer(&self) -> Reply {
        if std::process::id() == 1 {
            end_programs(GRACE).await;
        }
        let baseline = lock(&self.layer).take();
        let listed = on_a_thread(move || {
            let baseline = baseline.ok_or(LayerError::NotBegun)?;
            let root = Path::new("/");
            Files::list(root)?.changes(root, &baseline)
        });
        let changes = match listed.await {
            Ok(changes) => changes,
            Err(error) => return refusal(&error),
        };
        let (sender, receiver) = mpsc::channel(PIECES);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = write_archive(Path::new("/"), &changes, Pieces::new(sender.clone())) {
                log!("the layer ends early: {}", chain(&error));
                // The connection is cut: a part of the archive must not look like all of it.
                let _ = sender.blocking_send(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        });
        let mut reply = Response::new(Answer::Pieces(receiver));
        reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-tar"));
        reply
    }
}

async fn on_a_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LayerError> + Send + 'static,
) -> Result<T, LayerError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(LayerError::File { path: "/".into(), source: io::Error::other(error) }))
}

fn refusal(error: &LayerError) -> Reply {
    let status = match error {
        LayerError::NotBegun | LayerError::Whiteout(_) | LayerError::LongName(_) | LayerError::TooMany => {
            StatusCode::CONFLICT
        }
        LayerError::File { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    http_error(status, chain(error))
}
