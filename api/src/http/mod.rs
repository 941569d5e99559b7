//! HTTP on the sockets of VMs and of the supervisor: limits, access, errors and shared parts of
//! handlers.
//!
//! | file | content |
//! |---|---|
//! | `listen` | connections, their limits and timeouts |
//! | `session` | access over TCP, by a token or a session of the page |
//! | `guesses` | limits on wrong tokens |
//! | `stall` | clients that read nothing |
//! | `error` | errors as problem details |
//! | `optional` | bodies that may be missing |
//! | `frames` | bodies without end |
//! | `cancel` | requests whose clients have gone |
//! | `changes` | changes that the end of a process waits for |

mod cancel;
mod changes;
mod error;
mod frames;
mod guesses;
mod holding;
mod large_bodies;
mod listen;
mod optional;
pub mod session;
mod stall;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Json;
use tokio::time::timeout;

use crate::problem::ProblemKind;
use crate::types::{MAX_GRACE, StopRequest};

pub use cancel::{Cancel, CancelOnDrop};
pub use changes::{Change, Changes};
pub use error::{ApiError, PROBLEM_TYPE};
pub use frames::Frames;
pub use holding::holding;
pub use listen::{
    ACCEPT_BACKOFF, Accept, Acceptor, ClientProcess, LAST_ANSWERS_OF_ALL, MAX_CONNECTIONS, TcpAcceptor, accept,
    behind_gate, bind_tcp, serve_http, with_bodies,
};
pub use optional::Optional;
pub use session::SessionGate;

/// Time limit of a request's wait for a thread if no more can be created.
pub const THREAD_PATIENCE: Duration = Duration::from_secs(5);

/// The answer of a handler.
pub type Answer<T> = Result<Json<T>, ApiError>;

/// Runs blocking work on a thread if one is free within `limit`, otherwise not at all.
pub async fn on_a_thread<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let no_thread = || ApiError::from(ProblemKind::NoThread);
    // The first to set it decides whether the work is done: the thread, or the timeout.
    let taken = Arc::new(AtomicBool::new(false));
    let takes = Arc::clone(&taken);
    let run = move || {
        // Relaxed: the data goes through the task.
        if takes.swap(true, Ordering::Relaxed) { None } else { Some(work()) }
    };
    // spawn_blocking panics if there is no thread and none can be created. That fails this request,
    // not the connection.
    let mut task = catch_unwind(AssertUnwindSafe(|| tokio::task::spawn_blocking(run))).map_err(|_| no_thread())?;
    let ended = match timeout(limit, &mut task).await {
        Ok(ended) => ended,
        Err(_) if taken.swap(true, Ordering::Relaxed) => task.await,
        Err(_) => return Err(no_thread()),
    };
    let panicked = |_| ApiError::new(ProblemKind::Internal, "the request panicked; no VM was changed half-way");
    ended.map_err(panicked)?.ok_or_else(no_thread)
}

/// Returns the time for a guest to end by itself, or None if the VM is to be stopped at once.
pub fn grace(request: StopRequest) -> Result<Option<Duration>, ApiError> {
    let Some(seconds) = request.graceful_s else { return Ok(None) };
    let refused = || {
        let text = format!("graceful_s={seconds}: 0 to {MAX_GRACE} seconds");
        ApiError::new(ProblemKind::BadRequest, text)
    };
    if !(0.0..=MAX_GRACE).contains(&seconds) {
        return Err(refused());
    }
    Duration::try_from_secs_f64(seconds).map(Some).map_err(|_| refused())
}

/// Refuses a relative path: this process may have another working directory than the client.
pub fn expect_absolute(dir: &Path) -> Result<(), ApiError> {
    if dir.is_absolute() {
        return Ok(());
    }
    Err(ApiError::new(ProblemKind::BadPath, format!("{} is not an absolute path", dir.display())))
}

/// The answer at an unknown path.
pub async fn fallback() -> ApiError {
    ProblemKind::NoSuchPath.into()
}

/// The answer to a method that a path does not take.
pub async fn not_allowed() -> ApiError {
    ProblemKind::MethodNotAllowed.into()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_request_without_a_thread_is_refused_and_not_done_later() {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        let (end, ended) = mpsc::channel::<()>();
        runtime.block_on(async {
            let long = tokio::task::spawn_blocking(move || ended.recv().is_err());
            let done = Arc::new(AtomicBool::new(false));
            let does = Arc::clone(&done);
            let refused = on_a_thread(Duration::from_millis(10), move || does.store(true, Ordering::Relaxed)).await;
            assert_eq!(refused.map_err(|error| error.kind), Err(ProblemKind::NoThread));
            drop(end);
            assert!(long.await.unwrap());
            // The one thread takes queued work in order.
            assert_eq!(on_a_thread(THREAD_PATIENCE, || 7).await.map_err(|error| error.text), Ok(7));
            assert!(!done.load(Ordering::Relaxed), "who asked was told that it is not done");
        });
    }

    #[test]
    fn a_request_that_panics_is_one_answer() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let panicked = runtime.block_on(on_a_thread(THREAD_PATIENCE, || -> u8 { panic!("on purpose") }));
        assert_eq!(panicked.map_err(|error| error.kind), Err(ProblemKind::Internal));
    }
}
