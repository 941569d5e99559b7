//! Idempotency keys: a request that is sent again with its key gets the first answer.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use tokio::sync::watch;

use clade_api::ProblemKind;
use clade_api::http::ApiError;

const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Marks an answer as a repeat of the first.
pub(super) const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// Most bytes of a key.
pub(super) const MAX_KEY: usize = 128;
/// Most keys remembered.
const MAX_KEYS: usize = 1024;
/// Most bytes of all remembered answers.
const MAX_BYTES: usize = 16 << 20;
/// Lifetime of a remembered answer.
const REMEMBERED: Duration = Duration::from_secs(600);

/// An answer that can be given again.
#[derive(Clone, Debug)]
struct RememberedAnswer {
    status: StatusCode,
    media_type: Option<HeaderValue>,
    body: Bytes,
    /// Start of the time for which the answer is remembered.
    at: Instant,
}

impl RememberedAnswer {
    async fn of(response: Response) -> Result<Self, axum::Error> {
        let (head, body) = response.into_parts();
        let media_type = head.headers.get(header::CONTENT_TYPE).cloned();
        let body = body.collect().await?.to_bytes();
        Ok(Self { status: head.status, media_type, body, at: Instant::now() })
    }

    fn response(self, is_replayed: bool) -> Response {
        let mut response = (self.status, Body::from(self.body)).into_response();
        let headers = response.headers_mut();
        if let Some(media_type) = self.media_type {
            headers.insert(header::CONTENT_TYPE, media_type);
        }
        if is_replayed {
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
        }
        response
    }
}

#[derive(Debug)]
struct RememberedRequest {
    /// Hash of the method, the path and the body.
    fingerprint: u64,
    /// Holds the answer once it is ready.
    answer: watch::Receiver<Option<RememberedAnswer>>,
}

impl RememberedRequest {
    /// The age of its answer, if there is one.
    fn age(&self) -> Option<Duration> {
        self.answer.borrow().as_ref().map(|answer| answer.at.elapsed())
    }

    /// Bytes of its answer, if there is one.
    fn bytes(&self) -> Option<usize> {
        self.answer.borrow().as_ref().map(|answer| answer.body.len())
    }
}

/// The remembered requests, by their keys.
#[derive(Debug, Default)]
pub(super) struct Keys {
    all: Mutex<BTreeMap<String, RememberedRequest>>,
    hasher: RandomState,
}

/// A request with a key.
enum KeyedRequest {
    /// The first: its answer goes to the sender.
    First(watch::Sender<Option<RememberedAnswer>>, watch::Receiver<Option<RememberedAnswer>>),
    /// A repeated one.
    Again(watch::Receiver<Option<RememberedAnswer>>),
}

/// Forgets a key when dropped, unless its answer is kept.
struct Forget<'a> {
    keys: &'a Keys,
    key: &'a str,
    is_remembered: bool,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if !self.is_remembered {
            self.keys.all().remove(self.key);
        }
    }
}

impl Keys {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, RememberedRequest>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a turn for a request.
    fn turn(&self, key: &str, fingerprint: u64) -> Result<KeyedRequest, ApiError> {
        let mut all = self.all();
        all.retain(|_, entry| entry.age().is_none_or(|age| age < REMEMBERED));
        if let Some(entry) = all.get(key) {
            if entry.fingerprint != fingerprint {
                let text = format!("the idempotency key {key:?} was another request's, or had another body");
                return Err(ApiError::new(ProblemKind::KeyReused, text));
            }
            return Ok(KeyedRequest::Again(entry.answer.clone()));
        }
        while all.len() >= MAX_KEYS || all.values().filter_map(RememberedRequest::bytes).sum::<usize>() > MAX_BYTES {
            let done = all.iter().filter(|(_, entry)| entry.bytes().is_some());
            let oldest = done.max_by_key(|(_, entry)| entry.age()).map(|(key, _)| key.clone());
            let Some(oldest) = oldest else {
                let text = format!("{MAX_KEYS} requests with idempotency keys are under way");
                return Err(ApiError::new(ProblemKind::TooMany, text));
            };
            all.remove(&oldest);
        }
        let (sender, answer) = watch::channel(None);
        all.insert(key.to_owned(), RememberedRequest { fingerprint, answer: answer.clone() });
        Ok(KeyedRequest::First(sender, answer))
    }
}

/// Returns whether a request makes a resource, and so takes an idempotency key.
pub(super) fn is_idempotent(method: &str, path: &str) -> bool {
    let is_one_of_all = matches!(path, "/v1/vms" | "/v1/restore" | "/v1/checkpoints");
    method == "POST" && (is_one_of_all || path.ends_with("/fork") || path.ends_with("/checkpoint"))
}

/// Returns the key of a request.
fn key_of(request: &Request) -> Result<Option<String>, ApiError> {
    let Some(key) = request.headers().get(KEY) else { return Ok(None) };
    if !is_idempotent(request.method().as_str(), request.uri().path()) {
        return Ok(None);
    }
    let key = key.to_str().unwrap_or_default();
    if (1..=MAX_KEY).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(Some(key.to_owned()));
    }
    let text = format!("an idempotency key is 1 to {MAX_KEY} letters, digits and signs");
    Err(ApiError::new(ProblemKind::BadRequest, text))
}

/// Runs a request with a key once, to its end even if its client goes: a repeated request gets the
/// answer. Server errors (5xx) are not remembered.
pub(super) async fn once(State(keys): State<Arc<Keys>>, request: Request, next: Next) -> Response {
    match answer(&keys, request, next).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn answer(keys: &Arc<Keys>, request: Request, next: Next) -> Result<Response, ApiError> {
    let Some(key) = key_of(&request)? else { return Ok(next.run(request).await) };
    let (head, body) = request.into_parts();
    let unreadable = |error: axum::Error| ApiError::new(ProblemKind::BadRequest, error.to_string());
    let body = body.collect().await.map_err(unreadable)?.to_bytes();
    let fingerprint = keys.hasher.hash_one((head.method.as_str(), head.uri.path(), &body[..]));
    let (mut answered, is_replayed) = match keys.turn(&key, fingerprint)? {
        KeyedRequest::Again(answered) => (answered, true),
        KeyedRequest::First(sender, answered) => {
            let keys = Arc::clone(keys);
            tokio::spawn(async move {
                let mut forget = Forget { keys: &keys, key: &key, is_remembered: false };
                let answer = RememberedAnswer::of(next.run(Request::from_parts(head, Body::from(body))).await).await;
                let Ok(answer) = answer else { return };
                forget.is_remembered = !answer.status.is_server_error();
                // Before the waiting requests get the answer: they may try again at once.
                drop(forget);
                sender.send_replace(Some(answer));
            });
            (answered, false)
        }
    };
    // A missing answer means that the request has panicked.
    let answer = answered.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone());
    Ok(answer.ok_or(ProblemKind::Internal)?.response(is_replayed))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use axum::Router;
    use axum::middleware::from_fn_with_state;
    use axum::routing::post;
    use tokio::time::sleep;
    use tower::ServiceExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Made(Arc<AtomicU32>);

    /// Counts up after a while. `fail` is a server error, `bad` a client error.
    async fn make(State(made): State<Made>, body: String) -> (StatusCode, String) {
        sleep(Duration::from_millis(50)).await;
        let made = made.0.fetch_add(1, Ordering::Relaxed) + 1;
        let status = match body.as_str() {
            "fail" => StatusCode::INTERNAL_SERVER_ERROR,
            "bad" => StatusCode::CONFLICT,
            "panic" => panic!("on purpose"),
            _ => StatusCode::OK,
        };
        (status, made.to_string())
    }

    fn router(keys: &Arc<Keys>) -> Router {
        let paths = Router::new().route("/v1/vms", post(make)).route("/v1/vms/{name}/stop", post(make));
        paths.layer(from_fn_with_state(Arc::clone(keys), once)).with_state(Made::default())
    }

    async fn ask(router: &Router, path: &str, key: Option<&str>, body: &str) -> (u16, String, bool) {
        let request = Request::post(path);
        let request = key.into_iter().fold(request, |request, key| request.header(KEY, key));
        let response = router.clone().oneshot(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap();
        let (status, is_replayed) = (response.status().as_u16(), response.headers().contains_key(REPLAYED));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned(), is_replayed)
    }

    fn run(test: impl Future<Output = ()>) {
        // The clock goes on only when every task waits.
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().start_paused(true).build().unwrap().block_on(test);
    }

    #[test]
    fn a_repeated_request_gets_the_first_answer_also_at_the_same_time() {
        run(async {
            let keys = Arc::default();
            let all = router(&keys);
            let asked: Vec<_> = (0..16)
                .map(|_| {
                    let all = all.clone();
                    tokio::spawn(async move { ask(&all, "/v1/vms", Some("k"), "x").await })
                })
                .collect();
            let mut first = 0;
            for answer in asked {
                let (status, body, is_replayed) = answer.await.unwrap();
                assert_eq!((status, body.as_str()), (200, "1"));
                first += u32::from(!is_replayed);
            }
            assert_eq!(first, 1);
            assert_eq!(ask(&all, "/v1/vms", Some("k"), "x").await, (200, "1".to_owned(), true));
            // Another body, another key, no key, and a path that takes none.
            assert_eq!(ask(&all, "/v1/vms", Some("k"), "y").await.0, 422);
            assert_eq!(ask(&all, "/v1/vms", Some("l"), "x").await.1, "2");
            assert_eq!(ask(&all, "/v1/vms", None, "x").await.1, "3");
            for made in ["4", "5"] {
                assert_eq!(ask(&all, "/v1/vms/web/stop", Some("k"), "x").await, (200, made.to_owned(), false));
            }
        });
    }

    #[test]
    fn a_client_that_goes_finds_the_answer_when_it_comes_again() {
        run(async {
            let keys = Arc::default();
            let all = router(&keys);
            let gone = tokio::time::timeout(Duration::from_millis(10), ask(&all, "/v1/vms", Some("k"), "x")).await;
            assert!(gone.is_err());
            assert_eq!(ask(&all, "/v1/vms", Some("k"), "x").await, (200, "1".to_owned(), true));
        });
    }

    #[test]
    fn only_what_is_the_servers_fault_is_forgotten() {
        run(async {
            let keys = Arc::default();
            let all = router(&keys);
            for made in ["1", "2"] {
                assert_eq!(ask(&all, "/v1/vms", Some("f"), "fail").await, (500, made.to_owned(), false));
            }
            assert_eq!(ask(&all, "/v1/vms", Some("b"), "bad").await, (409, "3".to_owned(), false));
            assert_eq!(ask(&all, "/v1/vms", Some("b"), "bad").await, (409, "3".to_owned(), true));
            for _ in 0..2 {
                assert_eq!(ask(&all, "/v1/vms", Some("p"), "panic").await.0, 500);
            }
            assert_eq!(keys.all().len(), 1);
        });
    }

    #[test]
    fn keys_are_checked_and_bounded() {
        run(async {
            let keys: Arc<Keys> = Arc::default();
            let all = router(&keys);
            for key in ["", "two words", &"x".repeat(MAX_KEY + 1)] {
                assert_eq!(ask(&all, "/v1/vms", Some(key), "x").await.0, 400, "{key}");
            }
            let under_way: Vec<_> = (0..MAX_KEYS).map(|n| keys.turn(&n.to_string(), 0).unwrap()).collect();
            assert_eq!(ask(&all, "/v1/vms", Some("k"), "x").await.0, 503);
            let KeyedRequest::First(sender, _) = &under_way[7] else { panic!("it is the first") };
            let at = Instant::now();
            sender.send_replace(Some(RememberedAnswer {
                status: StatusCode::OK,
                media_type: None,
                body: Bytes::new(),
                at,
            }));
            assert_eq!(ask(&all, "/v1/vms", Some("k"), "x").await.0, 200);
            assert!(!keys.all().contains_key("7") && keys.all().contains_key("k"));
        });
    }

    #[test]
    fn an_answer_is_remembered_from_when_it_is_there() {
        let keys = Keys::default();
        let age = |seconds| Instant::now().checked_sub(REMEMBERED + Duration::from_secs(seconds));
        let (Some(long_ago), Ok(KeyedRequest::First(sender, _first))) = (age(1), keys.turn("k", 0)) else { return };
        let answered = |at| Some(RememberedAnswer { status: StatusCode::OK, media_type: None, body: Bytes::new(), at });
        // However long the request took.
        sender.send_replace(answered(Instant::now()));
        assert!(matches!(keys.turn("k", 0), Ok(KeyedRequest::Again(_))));
        sender.send_replace(answered(long_ago));
        assert!(matches!(keys.turn("k", 0), Ok(KeyedRequest::First(..))));
    }
}
