//! Forwarding of a request for one VM to its process.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes, HttpBody, to_bytes};
use axum::extract::Request;
use axum::http::HeaderName;
use axum::http::header::{AUTHORIZATION, COOKIE};
use axum::response::{IntoResponse, Response};
use hyper::Method;
use hyper::body::{Frame, SizeHint};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{Sleep, sleep, timeout};

use super::request_limiter::ForwardPermit;
use super::vm_record::vsock_known;
use clade_api::http::{ApiError, THREAD_PATIENCE, holding, on_a_thread};
use clade_api::{Client, ClientError, ProblemKind, VmInfo, check_name, socket_path};

/// Most bytes of a VM's description by its process.
pub(super) const MAX_INFO: usize = 1 << 20;

/// Time limits of a VM's process.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProxyLimits {
    /// Time to the first byte of its answer. After that a probe checks whether it answers at all.
    pub(super) answer: Duration,
    /// Time for an answer to the probe.
    pub(super) probe: Duration,
}

impl Default for ProxyLimits {
    fn default() -> Self {
        Self { answer: Duration::from_secs(70), probe: Duration::from_secs(15) }
    }
}

/// Forwards a request to the process of `name`. A long request, such as a snapshot, has as much
/// time as it needs while its process answers others.
pub(super) async fn forward(
    dir: &Path,
    name: &str,
    mut request: Request,
    limits: ProxyLimits,
) -> Result<Response, ApiError> {
    check_name(name)?;
    // Headers that identify the client, or have a meaning only here, are not for a VM's process.
    for header in [AUTHORIZATION, COOKIE, HeaderName::from_static("idempotency-key")] {
        request.headers_mut().remove(header);
    }
    let path = socket_path(dir, name);
    let silent = || ApiError::new(ProblemKind::VmSilent, format!("the process of {name:?} does not answer"));
    let stream = match UnixStream::connect(&path).await {
        // Its backlog is full: it accepts nothing.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(silent()),
        other => other.map_err(|source| ClientError::unreachable(name, path, source))?,
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::from)?;
    // The connection ends with the sender, or when the answer has been read.
    tokio::spawn(connection);
    let mut answer = std::pin::pin!(sender.send_request(request));
    loop {
        tokio::select! {
            response = answer.as_mut() => return Ok(response.map_err(ClientError::from)?.map(Body::new)),
            () = sleep(limits.answer) => {}
        }
        let client = Client::new(dir);
        let probe = client.request::<VmInfo>(Method::GET, name, "", None::<&()>);
        if timeout(limits.probe, probe).await.is_err() {
            return Err(silent());
        }
    }
}

/// The body of a forwarded answer with an end. It fails when the VM's process sends nothing for `limit`.
struct BoundedBody {
    body: Body,
    limit: Duration,
    /// The end of the wait for the next bytes. None while the client takes those that are there.
    until: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for BoundedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if frame.is_ready() {
            self.until = None;
            return frame;
        }
        let limit = self.limit;
        let until = self.until.get_or_insert_with(|| Box::pin(sleep(limit)));
        let silent = || axum::Error::new(io::Error::from(io::ErrorKind::TimedOut));
        until.as_mut().poll(context).map(|()| Some(Err(silent())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Bounds a forwarded answer, which counts with `permit` until its last byte. Its process has `limit` for each next
/// piece of it; none if the answer has no end.
pub(super) fn bounded(answer: Response, permit: ForwardPermit, limit: Option<Duration>) -> Response {
    answer.map(|body| {
        let body = match limit {
            Some(limit) => Body::new(BoundedBody { body, limit, until: None }),
            None => body,
        };
        holding(body, permit)
    })
}

/// Returns a VM's description by its process, with the socket that the supervisor has made: clients
/// connect there.
///
/// # Errors
/// When the answer is not a description of a VM.
pub(super) async fn shown(dir: &Path, name: String, answer: Response) -> Result<Response, ApiError> {
    let gone = |error: String| ApiError::new(ProblemKind::VmGone, format!("{name}: {error}"));
    let bytes = timeout(ProxyLimits::default().answer, to_bytes(answer.into_body(), MAX_INFO)).await;
    let bytes = bytes.map_err(|_| gone("its description does not end".to_owned()))?;
    let bytes = bytes.map_err(|error| gone(error.to_string()))?;
    let info = serde_json::from_slice(&bytes).map_err(|error| gone(error.to_string()))?;
    Ok(Json(with_own_socket(dir, name, info).await?).into_response())
}

/// Replaces the socket in a VM's description likewise.
///
/// # Errors
/// When the VM's record cannot be read.
pub(super) async fn with_own_socket(dir: &Path, name: String, info: VmInfo) -> Result<VmInfo, ApiError> {
    let dir = dir.to_owned();
    let known = on_a_thread(THREAD_PATIENCE, move || vsock_known(&dir, &name)).await??;
    Ok(VmInfo { vsock: known.unwrap_or(info.vsock.clone()), ..info })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use axum::Router;
    use http_body_util::BodyExt;
    use tokio::sync::mpsc;
    use tokio::time::{Instant, advance};

    use super::*;
    use crate::request_limiter::ForwardLimiter;
    use crate::vm_record::tests::record_with;
    use clade_api::http::Frames;
    use clade_api::{NameClaim, RuntimeDir};
    use clade_test_support::Watchdog;

    const LIMITS: ProxyLimits = ProxyLimits { answer: Duration::from_millis(100), probe: Duration::from_millis(200) };
    /// Longer than a test.
    const FOR_EVER: Duration = Duration::from_secs(24 * 3600);
    /// No process is silent for as long.
    const PATIENT: ProxyLimits = ProxyLimits { answer: FOR_EVER, probe: FOR_EVER };

    fn ask(dir: &Path, limits: ProxyLimits) -> Result<Vec<u8>, ApiError> {
        let _watchdog = Watchdog::new(Duration::from_secs(120), || "a request is forwarded".to_owned());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let request = Request::post("/v1/vms/web/snapshot").header("host", "x").body(Body::empty()).unwrap();
            let answer = forward(dir, "web", request, limits).await?;
            Ok(answer.into_body().collect().await.unwrap().to_bytes().to_vec())
        })
    }

    #[test]
    fn a_vm_that_never_answers_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        // Connections wait in its backlog.
        let _listener = UnixListener::bind(dir.path().join("web.sock")).unwrap();
        assert_eq!(ask(dir.path(), LIMITS).map_err(|error| error.kind), Err(ProblemKind::VmSilent));
    }

    #[test]
    fn a_vm_that_closes_or_talks_nonsense_is_gone() {
        for said in ["", "nonsense\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-"] {
            let dir = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(dir.path().join("web.sock")).unwrap();
            let serves = thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let _ = stream.read(&mut [0; 1024]);
                stream.write_all(said.as_bytes()).unwrap();
            });
            assert_eq!(ask(dir.path(), PATIENT).map_err(|error| error.kind), Err(ProblemKind::VmGone), "{said:?}");
            serves.join().unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ask(dir.path(), PATIENT).map_err(|error| error.kind), Err(ProblemKind::NoSuchVm));
    }

    #[test]
    fn a_long_request_goes_on_while_its_process_answers_others() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("web.sock")).unwrap();
        let serves = thread::spawn(move || {
            let (mut long, _) = listener.accept().unwrap();
            let _ = long.read(&mut [0; 1024]);
            for _ in 0..2 {
                let (mut probe, _) = listener.accept().unwrap();
                let _ = probe.read(&mut [0; 1024]);
                probe.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").unwrap();
            }
            long.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").unwrap();
        });
        // The first probe is soon, and each may be answered late.
        let limits = ProxyLimits { answer: LIMITS.answer, ..PATIENT };
        assert_eq!(ask(dir.path(), limits), Ok(b"done".to_vec()));
        serves.join().unwrap();
    }

    #[test]
    fn what_says_who_the_client_is_goes_to_no_vm() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("web.sock")).unwrap();
        let serves = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 4096];
            let got = stream.read(&mut bytes).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            String::from_utf8_lossy(&bytes[..got]).to_lowercase()
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let headers = [("authorization", "Bearer secret"), ("cookie", "secret"), ("idempotency-key", "secret")];
            let request = Request::post("/v1/vms/web/pause").header("host", "x").header("x-mine", "kept");
            let request = headers.into_iter().fold(request, |request, (name, value)| request.header(name, value));
            forward(dir.path(), "web", request.body(Body::empty()).unwrap(), PATIENT).await.unwrap();
        });
        let head = serves.join().unwrap();
        assert!(head.contains("x-mine: kept") && !head.contains("secret"), "{head}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_fails_when_its_process_is_silent_and_not_when_its_client_takes_its_time() {
        let limit = LIMITS.answer;
        for has_end in [true, false] {
            let limiter = ForwardLimiter::default();
            let (process, pieces) = mpsc::channel(1);
            let answer = Response::new(Body::new(Frames(pieces)));
            let mut body = bounded(answer, limiter.begin("web").unwrap(), has_end.then_some(limit)).into_body();
            for piece in ["one", "two"] {
                process.send(Bytes::from(piece)).await.unwrap();
                advance(3 * limit).await;
                assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), piece);
                advance(3 * limit).await;
                // The process sends another piece just in time.
                let process = process.clone();
                tokio::spawn(async move {
                    sleep(limit * 9 / 10).await;
                    process.send(Bytes::from("late")).await.unwrap();
                });
                assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "late");
            }
            let begun = Instant::now();
            let silent = timeout(10 * limit, body.frame()).await;
            if has_end {
                assert!(silent.unwrap().unwrap().is_err());
                assert_eq!(begun.elapsed(), limit);
            } else {
                assert!(silent.is_err(), "an answer without end");
            }
            // The request counts until its client has done with the body.
            let others: Vec<_> = std::iter::from_fn(|| limiter.begin("web").ok()).collect();
            drop(body);
            assert!(!others.is_empty() && limiter.begin("web").is_ok() && process.is_closed());
        }
    }

    /// The compromised process of a VM: it names another program's socket.
    async fn lie(listener: tokio::net::UnixListener) {
        let info = serde_json::json!({
            "name": "web", "pid": 1, "state": "running", "parent": null, "generation": 0, "cpus": 1, "age_s": 0.0,
            "memory": null, "vsock": { "cid": 3, "socket": "/run/docker.sock" },
        });
        let router = Router::new().fallback(async move || Json(info));
        axum::serve(listener, router).await.unwrap();
    }

    #[tokio::test]
    async fn no_socket_that_a_vms_process_names_is_shown_or_connected_to() {
        let held = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::create(held.path()).unwrap();
        let claim = NameClaim::new(&dir, "web").unwrap();
        record_with(Some("/run/web.vsock")).write(&claim).unwrap();
        for name in ["web", "alone"] {
            let listener = tokio::net::UnixListener::bind(socket_path(held.path(), name)).unwrap();
            tokio::spawn(lie(listener));
        }
        let client = Client::new(held.path());
        let own = Some("/run/web.vsock".into());
        assert_eq!(crate::agent_socket(&client, "web").await.unwrap(), own);
        let request = || Request::get("/v1/vms/web").body(axum::body::Body::empty()).unwrap();
        let answer = forward(held.path(), "web", request(), PATIENT).await.unwrap();
        let answer = shown(held.path(), "web".to_owned(), answer).await.unwrap();
        let bytes = to_bytes(answer.into_body(), MAX_INFO).await.unwrap();
        let info: VmInfo = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(info.vsock.map(|vsock| vsock.socket), own);
        // A VM without the device has no socket.
        record_with(None).write(&claim).unwrap();
        assert_eq!(crate::agent_socket(&client, "web").await.unwrap(), None);
        // The process of a VM without a supervisor answers itself.
        assert_eq!(crate::agent_socket(&client, "alone").await.unwrap(), Some("/run/docker.sock".into()));
    }
}
