use axum::Router;
use axum::body::to_bytes;
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tower::ServiceExt;

use super::*;
use crate::http::Frames;
use crate::http::guesses::{MAX_WRONG, WRONG_DELAY};

const TOKEN: &str = "0123456789abcdef";
const HOST_NAME: &str = "localhost:7777";
const OWN: (&str, &str) = ("origin", "http://localhost:7777");

/// A port with one path that echoes its request's headers, and a stream that the test feeds.
struct Port {
    router: Router,
    gate: Arc<SessionGate>,
    feed: mpsc::Sender<Bytes>,
}

/// A session as a page has it.
struct Halves {
    cookie: String,
    key: String,
}

impl Port {
    fn new() -> Self {
        let gate = Arc::new(SessionGate::new(Token::of_test(TOKEN), 7777));
        let (feed, frames) = mpsc::channel(4);
        let frames = Arc::new(Mutex::new(Some(frames)));
        let secrets = async |headers: HeaderMap| {
            [AUTHORIZATION, COOKIE, KEY].iter().any(|name| headers.contains_key(name)).to_string()
        };
        let stream = async move || Body::new(Frames(frames.lock().unwrap().take().unwrap()));
        let router = Router::new()
            .route("/v1/session", post(log_in).get(show_session).delete(log_out))
            .route("/v1/vms", get(secrets).post(secrets))
            .route("/v1/events", get(stream))
            .layer(from_fn_with_state(Arc::clone(&gate), authorize));
        Self { router, gate, feed }
    }

    async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
        let request = Request::builder().method(method).uri(path);
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        self.router.clone().oneshot(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap()
    }

    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> (u16, Value) {
        read(self.send(method, path, headers, "").await).await
    }

    async fn try_to_log_in(&self, token: &str, headers: &[(&str, &str)]) -> Response {
        let headers = [headers, &[("content-type", "application/json")]].concat();
        self.send("POST", PATH, &headers, &json!({ "token": token }).to_string()).await
    }

    async fn log_in(&self) -> Halves {
        let response = self.try_to_log_in(TOKEN, &[("host", HOST_NAME), OWN]).await;
        let cookie = response.headers()[SET_COOKIE].to_str().unwrap().to_owned();
        let (status, answer) = read(response).await;
        assert_eq!(status, 200, "{answer}");
        let (pair, attributes) = cookie.split_once("; ").unwrap();
        assert_eq!(attributes, "Path=/; Max-Age=43200; HttpOnly; SameSite=Strict");
        assert!(pair.starts_with("clade-7777=") && !cookie.contains(TOKEN), "{cookie}");
        Halves { cookie: pair.to_owned(), key: answer["key"].as_str().unwrap().to_owned() }
    }
}

async fn read(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let bytes = to_bytes(response.into_body(), 1 << 16).await.unwrap();
    (status, serde_json::from_slice(&bytes).unwrap_or_default())
}

impl Halves {
    fn headers<'a>(&'a self, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let own = [("host", HOST_NAME), ("cookie", self.cookie.as_str()), ("clade-session-key", self.key.as_str())];
        [&own, more].concat()
    }
}

fn run(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // The clock goes on only when every task waits.
    runtime.enable_all().start_paused(true).build().unwrap().block_on(test);
}

fn kind(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["type"].as_str().unwrap_or_default())
}

const UNAUTHORIZED: (u16, &str) = (401, "urn:clade:unauthorized");
const FOREIGN: (u16, &str) = (403, "urn:clade:foreign-origin");
const BAD_HOST: (u16, &str) = (403, "urn:clade:bad-host");

#[test]
fn the_token_is_shown_as_before_and_goes_no_further() {
    run(async {
        let port = Port::new();
        let bearer = format!("bearer {TOKEN}");
        let shown = [("host", "localhost"), ("authorization", bearer.as_str())];
        assert_eq!(port.ask("POST", "/v1/vms", &shown).await, (200, false.into()));
        assert_eq!(kind(&port.ask("GET", "/v1/vms", &[("host", "localhost")]).await), UNAUTHORIZED);
        let wrong = [("host", "localhost"), ("authorization", "Bearer 0123456789abcdee")];
        assert_eq!(kind(&port.ask("GET", "/v1/vms", &wrong).await), UNAUTHORIZED);
        let forged = [("host", "evil.example"), ("authorization", bearer.as_str())];
        assert_eq!(kind(&port.ask("GET", "/v1/vms", &forged).await), BAD_HOST);
    });
}

#[test]
fn a_session_needs_both_its_halves_and_the_page() {
    run(async {
        let port = Port::new();
        let own = port.log_in().await;
        let other = port.log_in().await;
        assert_eq!(port.ask("GET", "/v1/vms", &own.headers(&[])).await, (200, false.into()));
        assert_eq!(port.ask("POST", "/v1/vms", &own.headers(&[OWN])).await, (200, false.into()));
        let same = ("sec-fetch-site", "same-origin");
        assert_eq!(port.ask("POST", "/v1/vms", &own.headers(&[same])).await, (200, false.into()));
        // Halves of no session, of another, twice.
        let host = ("host", HOST_NAME);
        let (cookie, key) = (("cookie", own.cookie.as_str()), ("clade-session-key", own.key.as_str()));
        let both = format!("{}; {}", own.cookie, other.cookie);
        for headers in [
            vec![host, cookie],
            vec![host, key],
            vec![host, cookie, ("clade-session-key", other.key.as_str())],
            vec![host, cookie, key, key],
            vec![host, ("cookie", "clade-7777="), ("clade-session-key", "")],
            vec![host, ("cookie", "clade-7777=0"), key],
            vec![host, ("cookie", both.as_str()), key],
        ] {
            assert_eq!(kind(&port.ask("GET", "/v1/vms", &headers).await), UNAUTHORIZED, "{headers:?}");
        }
        // From another origin, or from none.
        assert_eq!(kind(&port.ask("POST", "/v1/vms", &own.headers(&[])).await), FOREIGN);
        for (name, value) in [
            ("origin", "http://evil.example"),
            ("origin", "http://localhost:7778"),
            ("origin", "http://localhost:7777.evil.example"),
            ("origin", "ftp://localhost:7777"),
            ("origin", "null"),
            ("sec-fetch-site", "same-site"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "none"),
        ] {
            for method in ["GET", "POST"] {
                let headers = own.headers(&[(name, value)]);
                assert_eq!(kind(&port.ask(method, "/v1/vms", &headers).await), FOREIGN, "{method} {name}: {value}");
            }
        }
        let twice = port.ask("POST", "/v1/vms", &own.headers(&[OWN, OWN])).await;
        assert_eq!(kind(&twice), (400, "urn:clade:bad-request"));
        let headers = [("host", "evil.example:7777"), cookie, key, ("origin", "http://evil.example:7777")];
        assert_eq!(kind(&port.ask("POST", "/v1/vms", &headers).await), BAD_HOST);
    });
}

#[test]
fn a_login_is_the_pages_and_wrong_ones_take_their_time() {
    run(async {
        let port = Port::new();
        for (headers, expected) in [
            (vec![("host", HOST_NAME)], FOREIGN),
            (vec![("host", HOST_NAME), ("origin", "http://evil.example")], FOREIGN),
            (vec![("host", HOST_NAME), OWN, ("sec-fetch-site", "cross-site")], FOREIGN),
            (vec![("host", "evil.example"), ("origin", "http://evil.example")], BAD_HOST),
        ] {
            assert_eq!(kind(&read(port.try_to_log_in(TOKEN, &headers).await).await), expected, "{headers:?}");
        }
        let by_tls = [("host", HOST_NAME), ("origin", "https://localhost:7777")];
        let response = port.try_to_log_in(TOKEN, &by_tls).await;
        assert!(response.headers()[SET_COOKIE].to_str().unwrap().ends_with("; SameSite=Strict; Secure"));
        let page = [("host", HOST_NAME), OWN];
        let begun = Instant::now();
        let mut wrong = tokio::task::JoinSet::new();
        for _ in 0..MAX_WRONG {
            let (router, gate) = (port.router.clone(), Arc::clone(&port.gate));
            let port = Port { router, gate, feed: port.feed.clone() };
            wrong.spawn(async move { read(port.try_to_log_in("0123456789abcdee", &page).await).await });
        }
        while port.gate.guesses.left(None) > 0 {
            tokio::task::yield_now().await;
        }
        // Not even the right one is checked: guesses learn nothing meanwhile.
        let refused = read(port.try_to_log_in(TOKEN, &page).await).await;
        assert_eq!(kind(&refused), (429, "urn:clade:too-many-logins"));
        while let Some(answer) = wrong.join_next().await {
            assert_eq!(kind(&answer.unwrap()), UNAUTHORIZED);
        }
        assert!(begun.elapsed() >= WRONG_DELAY);
        port.log_in().await;
        let body = [("host", HOST_NAME), OWN, ("content-type", "text/plain")];
        let plain = port.send("POST", PATH, &body, "{}").await;
        assert_eq!(plain.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
    });
}

#[test]
fn guesses_of_an_address_are_few_and_no_others_wait_for_them() {
    run(async {
        let port = Port::new();
        let ask = async |address: &str, token: &str, limit: Duration| {
            let request = Request::builder().uri("/v1/vms").header("host", "localhost");
            let request = request.header("authorization", format!("Bearer {token}"));
            let mut request = request.body(Body::empty()).unwrap();
            request.extensions_mut().insert(Peer(address.parse().unwrap()));
            let answer = tokio::time::timeout(limit, port.router.clone().oneshot(request)).await;
            Some(read(answer.ok()?.unwrap()).await)
        };
        let (soon, patient) = (Duration::from_millis(50), WRONG_DELAY * 10);
        let begun = Instant::now();
        // Clients that do not wait for the answers keep their places all the same.
        for n in 0..MAX_WRONG {
            let address = format!("127.0.0.{}", n + 1);
            assert_eq!(ask(&address, "0123456789abcdee", soon).await, None, "a wrong token is answered at once");
        }
        let wrong = ask("127.0.0.1", "0123456789abcdee", patient).await.unwrap();
        assert!(begun.elapsed() < WRONG_DELAY, "too slow to say");
        assert_eq!(kind(&wrong), (429, "urn:clade:too-many-logins"), "one more");
        assert_eq!(ask("127.0.0.1", TOKEN, soon).await, Some((200, false.into())), "who has it waits for nobody");
        // Another address, a text that is not a token, a session, and a later attempt.
        assert_eq!(ask("10.0.0.1", TOKEN, patient).await, Some((200, false.into())));
        for short in ["", "x", &"y".repeat(300)] {
            assert_eq!(ask("127.0.0.1", short, soon).await.as_ref().map(kind), Some(UNAUTHORIZED));
        }
        let own = port.log_in().await;
        assert_eq!(port.ask("GET", "/v1/vms", &own.headers(&[])).await.0, 200);
        tokio::time::sleep(WRONG_DELAY).await;
        assert_eq!(ask("127.0.0.1", TOKEN, soon).await, Some((200, false.into())));
        let begun = Instant::now();
        assert_eq!(ask("127.0.0.1", "0123456789abcdee", patient).await.as_ref().map(kind), Some(UNAUTHORIZED));
        assert!(begun.elapsed() >= WRONG_DELAY);
    });
}

#[test]
fn a_session_ends_with_its_streams() {
    run(async {
        let port = Port::new();
        let (own, other) = (port.log_in().await, port.log_in().await);
        let (status, info) = port.ask("GET", PATH, &own.headers(&[])).await;
        assert!(status == 200 && info["expires_s"].as_u64().unwrap() > 43_000 && info.get("key").is_none(), "{info}");
        let stream = port.send("GET", "/v1/events", &own.headers(&[]), "").await;
        port.feed.send(Bytes::from_static(b"one")).await.unwrap();
        let ended = port.send("DELETE", PATH, &own.headers(&[OWN]), "").await;
        let cleared = ended.headers()[SET_COOKIE].to_str().unwrap().to_owned();
        assert!(cleared.starts_with("clade-7777=; ") && cleared.contains("Max-Age=0"), "{cleared}");
        assert_eq!(read(ended).await, (200, json!({ "ended": true })));
        // Its sender still exists.
        assert_eq!(to_bytes(stream.into_body(), 64).await.unwrap(), "one");
        assert!(port.feed.is_closed());
        assert_eq!(kind(&port.ask("GET", "/v1/vms", &own.headers(&[])).await), UNAUTHORIZED);
        assert_eq!(port.ask("GET", "/v1/vms", &other.headers(&[])).await.0, 200);
        assert_eq!(kind(&port.ask("DELETE", PATH, &other.headers(&[])).await), FOREIGN);
    });
}

#[test]
fn sessions_are_bounded_in_number_and_in_time() {
    run(async {
        let port = Port::new();
        let first = port.log_in().await;
        for _ in 0..MAX_SESSIONS {
            port.log_in().await;
        }
        assert_eq!(port.gate.sessions().len(), MAX_SESSIONS);
        assert_eq!(kind(&port.ask("GET", "/v1/vms", &first.headers(&[])).await), UNAUTHORIZED);
        let last = port.log_in().await;
        port.gate.sessions().iter_mut().for_each(|session| session.expires = Instant::now());
        assert_eq!(kind(&port.ask("GET", "/v1/vms", &last.headers(&[])).await), UNAUTHORIZED);
    });
}

#[test]
fn who_needs_no_session_has_none() {
    run(async {
        let router = Router::new().route(PATH, post(log_in).get(show_session).delete(log_out));
        for (method, body) in [("POST", r#"{"token": "x"}"#), ("GET", ""), ("DELETE", "")] {
            let request = Request::builder().method(method).uri(PATH).header("content-type", "application/json");
            let request = request.body(Body::from(body)).unwrap();
            let answer = read(router.clone().oneshot(request).await.unwrap()).await;
            assert_eq!(kind(&answer), (400, "urn:clade:bad-request"), "{method}");
        }
    });
}
