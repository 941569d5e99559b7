//! Access over TCP: by the token, or by a session of the page.
//!
//! A session has two halves. One is a cookie that scripts cannot read. The other is a key that the
//! page keeps in its origin's storage and sends in a header. Browsers send cookies to every port of
//! a host; storage is the origin's alone. So a server on another port gets the cookie, which is
//! only half of a session. Sessions are kept in memory, and end with the process.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::JsonRejection;
use axum::extract::{Extension, Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, ORIGIN, SET_COOKIE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use utoipa::ToSchema;

use super::ApiError;
use super::guesses::{Guesses, Peer};
use crate::{ProblemKind, Token, is_for_this_host, random_hex};

/// Lifetime of a session.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// Sessions at a time. One more ends the oldest.
const MAX_SESSIONS: usize = 64;
/// The header with a session's key.
const KEY: HeaderName = HeaderName::from_static("clade-session-key");
/// The browser's header with the origin of a request.
const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
/// The path of the calls that begin and end sessions.
const PATH: &str = "/v1/session";

/// A session: its halves, and its end.
#[derive(Debug)]
struct PageSession {
    cookie: String,
    key: String,
    expires: Instant,
    /// Dropped with the session: streams begun with it then end.
    ended: watch::Sender<()>,
}

/// The session that authorized a request.
#[derive(Clone, Debug)]
pub struct OfSession {
    cookie: String,
    expires: Instant,
    ended: watch::Receiver<()>,
}

/// The token and the sessions of a port.
#[derive(Debug)]
pub struct SessionGate {
    token: Token,
    /// The cookie's name, with the port: a browser keeps one cookie of a name for all ports.
    name: String,
    sessions: Mutex<Vec<PageSession>>,
    guesses: Guesses,
}

impl SessionGate {
    /// Returns the gate of the port that clients of this host connect to.
    pub fn new(token: Token, port: u16) -> Self {
        let name = format!("clade-{port}");
        Self { token, name, sessions: Mutex::default(), guesses: Guesses::default() }
    }

    /// Checks a token of `peer`. A wrong one takes its time.
    async fn expect_token(&self, peer: Option<Peer>, given: &[u8]) -> Result<(), ApiError> {
        if !Token::may_be(given) {
            return Err(ProblemKind::Unauthorized.into());
        }
        let guess = self.guesses.take(peer)?;
        if self.token.is(given) {
            return Ok(());
        }
        guess.wait_out().await;
        Err(ProblemKind::Unauthorized.into())
    }

    /// Returns the sessions that have not ended.
    fn sessions(&self) -> MutexGuard<'_, Vec<PageSession>> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        sessions.retain(|session| session.expires > now);
        sessions
    }

    /// Returns the session whose halves a request both shows.
    fn shown(&self, headers: &HeaderMap) -> Option<OfSession> {
        let key = one(headers, &KEY).ok()??.as_bytes();
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let mut own = cookies.flat_map(|value| value.split(';')).filter_map(|pair| {
            let (name, value) = pair.trim().split_once('=')?;
            (name == self.name).then_some(value)
        });
        let cookie = own.next()?;
        // Another path or domain of a browser has set a second. Either may be the foreign one.
        if own.next().is_some() {
            return None;
        }
        let sessions = self.sessions();
        let is_it = |session: &&PageSession| {
            // Both in full, so that the time shows nothing of either.
            let is_cookie = session.cookie.as_bytes().ct_eq(cookie.as_bytes());
            bool::from(is_cookie & session.key.as_bytes().ct_eq(key))
        };
        let session = sessions.iter().find(is_it)?;
        Some(OfSession { cookie: session.cookie.clone(), expires: session.expires, ended: session.ended.subscribe() })
    }

    /// Begins a session. Returns its cookie and its key.
    fn begin(&self) -> std::io::Result<(String, String)> {
        let (cookie, key) = (random_hex::<32>()?, random_hex::<32>()?);
        let mut sessions = self.sessions();
        if sessions.len() == MAX_SESSIONS {
            sessions.remove(0);
        }
        let expires = Instant::now() + LIFETIME;
        sessions.push(PageSession { cookie: cookie.clone(), key: key.clone(), expires, ended: watch::Sender::new(()) });
        Ok((cookie, key))
    }

    fn end(&self, of: &OfSession) {
        self.sessions().retain(|session| session.cookie != of.cookie);
    }

    fn set_cookie(&self, value: &str, max_age: u64, is_secure: bool) -> String {
        let secure = if is_secure { "; Secure" } else { "" };
        format!("{}={value}; Path=/; Max-Age={max_age}; HttpOnly; SameSite=Strict{secure}", self.name)
    }
}

/// A header that may be there once. An error if it is there more often.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a HeaderValue>, ApiError> {
    let mut all = headers.get_all(name).iter();
    let first = all.next();
    match all.next() {
        None => Ok(first),
        Some(_) => Err(ApiError::new(ProblemKind::BadRequest, format!("the header {name} is there twice"))),
    }
}

/// The source of a request, by its own headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RequestOrigin {
    /// The page of this server, by plain HTTP or by TLS that ends before it.
    Page { by_tls: bool },
    /// The headers name no source.
    Unknown,
}

/// Returns the source of a request. An error if that is another origin.
fn origin(headers: &HeaderMap) -> Result<RequestOrigin, ApiError> {
    let foreign = |what: &str| ApiError::new(ProblemKind::ForeignOrigin, format!("the request comes from {what}"));
    let site = one(headers, &SITE)?.map(HeaderValue::as_bytes);
    if let Some(site) = site.filter(|site| *site != b"same-origin") {
        return Err(foreign(&format!("{SITE}: {}", String::from_utf8_lossy(site))));
    }
    let host = one(headers, &HOST)?.and_then(|host| host.to_str().ok()).unwrap_or_default();
    let Some(origin) = one(headers, &ORIGIN)? else {
        return Ok(if site.is_some() { RequestOrigin::Page { by_tls: false } } else { RequestOrigin::Unknown });
    };
    let text = origin.to_str().unwrap_or_default();
    let own = [("http://", false), ("https://", true)].into_iter();
    let mut own = own.filter_map(|(scheme, by_tls)| Some((text.strip_prefix(scheme)?, by_tls)));
    let own = own.find(|(authority, _)| authority.eq_ignore_ascii_case(host));
    own.map(|(_, by_tls)| RequestOrigin::Page { by_tls })
        .ok_or_else(|| foreign(&format!("{text:?}, and not from {host:?}")))
}

/// Checks that a request for a change names the page as its source. Returns whether it came by TLS.
fn expect_page(headers: &HeaderMap) -> Result<bool, ApiError> {
    match origin(headers)? {
        RequestOrigin::Page { by_tls } => Ok(by_tls),
        RequestOrigin::Unknown => {
            Err(ApiError::new(ProblemKind::ForeignOrigin, "the request does not say where it comes from"))
        }
    }
}

/// Refuses a request that shows neither the token nor a session, or is for another host.
pub(crate) async fn authorize(State(gate): State<Arc<SessionGate>>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    let admitted = match admit(&gate, &request) {
        // The holder of the token is let through, even during guesses by others: they may have the
        // same address, behind a proxy or on this host.
        Ok(Admitted::ByToken(given)) if gate.token.is(&given) => Ok(None),
        Ok(Admitted::ByToken(given)) => gate.expect_token(peer, &given).await.map(|()| None),
        Ok(Admitted::BySession(session)) => Ok(Some(session)),
        Ok(Admitted::ToLogIn) => Ok(None),
        Err(error) => Err(error),
    };
    let session = match admitted {
        Ok(session) => session,
        Err(error) => return error.into_response(),
    };
    // These stay here: a VM's process, to which a request may be forwarded, is not trusted.
    for header in [AUTHORIZATION, COOKIE, KEY] {
        request.headers_mut().remove(header);
    }
    request.extensions_mut().insert(Arc::clone(&gate));
    let Some(session) = session else { return next.run(request).await };
    request.extensions_mut().insert(session.clone());
    next.run(request).await.map(|body| Body::new(OfSessionBody::new(body, session)))
}

/// The authorization of a request.
enum Admitted {
    /// By this text, if it is the token.
    ByToken(Vec<u8>),
    BySession(OfSession),
    /// To log in: its token is in its body.
    ToLogIn,
}

fn admit(gate: &SessionGate, request: &Request) -> Result<Admitted, ApiError> {
    if !is_for_this_host(request) {
        return Err(ProblemKind::BadHost.into());
    }
    let headers = request.headers();
    if request.uri().path() == PATH && request.method() == Method::POST {
        return Ok(Admitted::ToLogIn);
    }
    if let Some(given) = headers.get(AUTHORIZATION) {
        let shown = given.as_bytes().split_at_checked("Bearer ".len());
        let shown = shown.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
        let (_, token) = shown.ok_or(ProblemKind::Unauthorized)?;
        return Ok(Admitted::ByToken(token.to_vec()));
    }
    let session = gate.shown(headers).ok_or(ProblemKind::Unauthorized)?;
    match *request.method() {
        Method::GET | Method::HEAD => drop(origin(headers)?),
        _ => drop(expect_page(headers)?),
    }
    Ok(Admitted::BySession(session))
}

/// The body of an answer that ends with its request's session.
struct OfSessionBody {
    body: Body,
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl OfSessionBody {
    fn new(body: Body, session: OfSession) -> Self {
        let OfSession { expires, mut ended, .. } = session;
        let ended = async move {
            tokio::select! {
                // No value is ever sent: it fails when the session is gone.
                _ = ended.changed() => {}
                () = sleep_until(expires) => {}
            }
        };
        Self { body, ended: Box::pin(ended) }
    }
}

impl HttpBody for OfSessionBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        // Pending data first: the answer to a logout comes after the session's end.
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Pending => self.ended.as_mut().poll(context).map(|()| None),
            ready => ready,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// A request for a session.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(missing_debug_implementations, reason = "the token is secret")]
pub struct LoginRequest {
    /// The token.
    token: String,
}

/// A session of the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionInfo {
    /// The value of `Clade-Session-Key` in each request, beside the cookie; in the answer to a
    /// login.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub key: Option<String>,
    /// Seconds until it ends.
    pub expires_s: u64,
}

/// The end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionEnded {
    /// Always true.
    pub ended: bool,
}

type Gated = Option<Extension<Arc<SessionGate>>>;

fn none_here() -> ApiError {
    ApiError::new(ProblemKind::BadRequest, "there are no sessions here: this client needs none")
}

/// Begins a session of the page: a cookie, and a key that each request has beside it.
#[utoipa::path(
    post,
    path = "/v1/session",
    // The token is in the body: a missing header is not an error.
    security(()),
    request_body = LoginRequest,
    responses((status = 200, description = "Done.", body = SessionInfo))
)]
pub async fn log_in(
    gate: Gated,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    request: Result<Json<LoginRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = request?;
    let Extension(gate) = gate.ok_or_else(none_here)?;
    let is_secure = expect_page(&headers)?;
    gate.expect_token(peer.map(|Extension(peer)| peer), request.token.as_bytes()).await?;
    let failed = |error: std::io::Error| ApiError::new(ProblemKind::Internal, format!("no random numbers: {error}"));
    let (cookie, key) = gate.begin().map_err(failed)?;
    let info = SessionInfo { key: Some(key), expires_s: LIFETIME.as_secs() };
    Ok(([(SET_COOKIE, gate.set_cookie(&cookie, LIFETIME.as_secs(), is_secure))], Json(info)).into_response())
}

/// Shows the session of the request.
#[utoipa::path(get, path = "/v1/session", responses((status = 200, description = "Done.", body = SessionInfo)))]
pub async fn show_session(session: Option<Extension<OfSession>>) -> Result<Json<SessionInfo>, ApiError> {
    let Extension(session) = session.ok_or_else(none_here)?;
    let expires_s = session.expires.saturating_duration_since(Instant::now()).as_secs();
    Ok(Json(SessionInfo { key: None, expires_s }))
}

/// Ends the session of the request, and the streams that were begun in it.
#[utoipa::path(delete, path = "/v1/session", responses((status = 200, description = "Done.", body = SessionEnded)))]
pub async fn log_out(gate: Gated, session: Option<Extension<OfSession>>) -> Result<Response, ApiError> {
    let (Some(Extension(gate)), Some(Extension(session))) = (gate, session) else { return Err(none_here()) };
    gate.end(&session);
    Ok(([(SET_COOKIE, gate.set_cookie("", 0, false))], Json(SessionEnded { ended: true })).into_response())
}

#[cfg(test)]
mod tests;
