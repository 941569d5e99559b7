//! The Connect protocol: calls with one answer, and calls with streams.

use std::future::Future;
use std::io;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use clade_agent_proto::envelope::{END_OF_STREAM, Envelopes, seal, seal_end};
use clade_agent_proto::{
    Code, EnvelopeError, KEEPALIVE_HEADER, MAX_MESSAGE, RpcError, STREAM_TYPE, TIMEOUT_HEADER, UNARY_TYPE, decode,
    encode,
};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::agent::Agent;
use crate::http::{Answer, BODY_TIMEOUT, BodyError, Reply, Shared, json, piece, reply, text, turn, whole};
use crate::users::{self, User};

/// Default silence of a stream before a keepalive.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// The parameters in a call's headers.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    named: Option<User>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) keepalive: Duration,
}

impl Caller {
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, RpcError> {
        let named = match basic_user(headers) {
            None => None,
            Some(name) => Some(
                users::find_with_group(&name)
                    .ok_or_else(|| RpcError::new(Code::Unauthenticated, format_args!("invalid username: '{name}'")))?,
            ),
        };
        let timeout = match text(headers, TIMEOUT_HEADER) {
            None | Some("") => None,
            Some(millis) => {
                let invalid = || RpcError::invalid(format_args!("{millis:?} is no time-out"));
                let millis: u64 = millis.parse().map_err(|_| invalid())?;
                // The protocol allows at most ten digits: four months.
                (millis > 0).then(|| Duration::from_millis(millis.min(9_999_999_999)))
            }
        };
        let keepalive = text(headers, KEEPALIVE_HEADER).and_then(|seconds| seconds.parse().ok());
        let keepalive =
            keepalive.filter(|seconds| (1..=86_400).contains(seconds)).map_or(KEEPALIVE, Duration::from_secs);
        Ok(Self { named, timeout, keepalive })
    }

    /// The user of the call.
    pub(crate) fn user(&self, agent: &Agent) -> Result<User, RpcError> {
        if let Some(user) = &self.named {
            return Ok(user.clone());
        }
        let name = agent.settings().user.clone();
        users::find_with_group(&name)
            .ok_or_else(|| RpcError::new(Code::Unauthenticated, format_args!("invalid default user: '{name}'")))
    }
}

/// The user's name. There is no password: a group may stand in its place.
fn basic_user(headers: &HeaderMap) -> Option<String> {
    let encoded = text(headers, AUTHORIZATION.as_str())?.strip_prefix("Basic ")?;
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (name, group) = decoded.split_once(':')?;
    match group.trim_end_matches(':') {
        "" => Some(name.to_owned()),
        group => Some(format!("{name}:{group}")),
    }
}

/// The answer of a call that failed.
pub(crate) fn error(error: &RpcError) -> Reply {
    let status = StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    reply(status, UNARY_TYPE, encode(error))
}

fn media_type(headers: &HeaderMap) -> &str {
    text(headers, CONTENT_TYPE.as_str()).map_or("", |value| value.split(';').next().unwrap_or("").trim())
}

/// The answer to an unsupported media type or encoding.
fn refused(headers: &HeaderMap, wanted: &'static str) -> Option<Reply> {
    let encoding = if wanted == UNARY_TYPE { "content-encoding" } else { "connect-content-encoding" };
    if text(headers, encoding).is_some_and(|value| !value.eq_ignore_ascii_case("identity")) {
        return Some(error(&RpcError::new(Code::Unimplemented, "requests are not compressed")));
    }
    let given = media_type(headers);
    if given.eq_ignore_ascii_case(wanted) {
        return None;
    }
    let mut reply = reply(StatusCode::UNSUPPORTED_MEDIA_TYPE, "text/plain", Vec::new());
    reply.headers_mut().insert("accept-post", HeaderValue::from_static(wanted));
    Some(reply)
}

fn message<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RpcError> {
    decode(bytes).map_err(|error| RpcError::invalid(format_args!("the message cannot be read: {error}")))
}

async fn within<T>(timeout: Option<Duration>, call: impl Future<Output = Result<T, RpcError>>) -> Result<T, RpcError> {
    let Some(timeout) = timeout else { return call.await };
    match tokio::time::timeout(timeout, call).await {
        Ok(answer) => answer,
        Err(_) => Err(RpcError::new(Code::DeadlineExceeded, "the time of the call is over")),
    }
}

/// A call with one request and one answer.
pub(crate) async fn unary<Q, A, F>(
    agent: &Shared,
    request: Request<Incoming>,
    call: impl FnOnce(Q, Caller) -> F,
) -> Reply
where
    Q: DeserializeOwned,
    A: Serialize,
    F: Future<Output = Result<A, RpcError>>,
{
    let (head, mut body) = request.into_parts();
    if let Some(reply) = refused(&head.headers, UNARY_TYPE) {
        return reply;
    }
    let answer = async {
        let caller = Caller::of(&head.headers)?;
        let timeout = caller.timeout;
        let called = async {
            let bytes = whole(agent, &mut body).await?;
            let request = message(&bytes)?;
            drop(bytes);
            call(request, caller).await
        };
        within(timeout, called).await
    };
    answer.await.map_or_else(|refused| error(&refused), |answer| json(&answer))
}

/// The sender of a stream's messages.
#[derive(Debug)]
pub(crate) struct Sink(mpsc::Sender<io::Result<Bytes>>);

impl Sink {
    /// Waits until there is room for the message.
    pub(crate) async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), RpcError> {
        let gone = |_| RpcError::new(Code::Canceled, "the client has gone");
        self.0.send(Ok(seal(message).into())).await.map_err(gone)
    }

    /// Ends when the client has disconnected.
    pub(crate) async fn closed(&self) {
        self.0.closed().await;
    }
}

fn streamed() -> (mpsc::Sender<io::Result<Bytes>>, Reply) {
    let (sender, receiver) = mpsc::channel(1);
    let mut reply = Response::new(Answer::Pieces(receiver));
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(STREAM_TYPE));
    (sender, reply)
}

/// A call with a request and a stream of answers.
pub(crate) async fn server_stream<Q, F>(
    agent: &Shared,
    request: Request<Incoming>,
    call: impl FnOnce(Q, Caller, Sink) -> F,
) -> Reply
where
    Q: DeserializeOwned,
    F: Future<Output = Result<(), RpcError>> + Send + 'static,
{
    let (head, body) = request.into_parts();
    if let Some(reply) = refused(&head.headers, STREAM_TYPE) {
        return reply;
    }
    let (sender, reply) = streamed();
    let begun = async {
        let caller = Caller::of(&head.headers)?;
        let mut messages = Messages::new(agent, body);
        let first = messages.next().await?.ok_or_else(|| RpcError::new(Code::Unimplemented, "there is no request"))?;
        if messages.next::<Q>().await?.is_some() {
            return Err(RpcError::new(Code::Unimplemented, "there is more than one request"));
        }
        Ok((caller.timeout, call(first, caller, Sink(sender.clone()))))
    };
    let (timeout, call) = match begun.await {
        Ok((timeout, call)) => (timeout, Ok(call)),
        Err(error) => (None, Err(error)),
    };
    tokio::spawn(async move {
        let ended = match call {
            Ok(call) => within(timeout, call).await,
            Err(error) => Err(error),
        };
        // The client may have disconnected.
        let _ = sender.send(Ok(seal_end(ended.err()).into())).await;
    });
    reply
}

/// A call with a stream of requests and one answer.
pub(crate) async fn client_stream<A, F>(
    agent: &Shared,
    request: Request<Incoming>,
    call: impl FnOnce(Messages) -> F,
) -> Reply
where
    A: Serialize,
    F: Future<Output = Result<A, RpcError>>,
{
    let (head, body) = request.into_parts();
    if let Some(reply) = refused(&head.headers, STREAM_TYPE) {
        return reply;
    }
    let answer = async {
        let caller = Caller::of(&head.headers)?;
        within(caller.timeout, call(Messages::new(agent, body))).await
    };
    let bytes = match answer.await {
        Ok(answer) => [seal(&answer), seal_end(None)].concat(),
        Err(error) => seal_end(Some(error)),
    };
    reply(StatusCode::OK, STREAM_TYPE, bytes)
}

/// The messages of a request.
#[derive(Debug)]
pub(crate) struct Messages {
    agent: Shared,
    body: Incoming,
    envelopes: Envelopes,
    is_over: bool,
}

impl From<EnvelopeBroken> for RpcError {
    fn from(broken: EnvelopeBroken) -> Self {
        let code = match broken.0 {
            EnvelopeError::TooLong { .. } => Code::ResourceExhausted,
            EnvelopeError::Flags { .. } | EnvelopeError::Truncated { .. } => Code::InvalidArgument,
        };
        Self::new(code, broken.0)
    }
}

struct EnvelopeBroken(EnvelopeError);

impl Messages {
    fn new(agent: &Shared, body: Incoming) -> Self {
        Self { agent: Shared::clone(agent), body, envelopes: Envelopes::new(MAX_MESSAGE), is_over: false }
    }

    /// The next message; `None` after the last.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, RpcError> {
        let agent = Shared::clone(&self.agent);
        // A client that sends a large message byte by byte would keep its permit.
        let (mut held, mut until) = (None, None);
        while !self.is_over {
            if let Some(envelope) = self.envelopes.next_envelope().map_err(EnvelopeBroken)? {
                if envelope.flags & END_OF_STREAM == 0 {
                    return message(&envelope.message).map(Some);
                }
                self.is_over = true;
                break;
            }
            turn(&agent, &mut held, self.envelopes.announced()).await?;
            if held.is_some() {
                until.get_or_insert_with(|| Instant::now() + BODY_TIMEOUT);
            }
            let next = match until {
                Some(until) => timeout_at(until, piece(&mut self.body)).await.unwrap_or(Err(BodyError::Late)),
                None => piece(&mut self.body).await,
            };
            match next {
                Ok(Some(data)) => self.envelopes.push(&data),
                Ok(None) => {
                    self.envelopes.finish().map_err(EnvelopeBroken)?;
                    self.is_over = true;
                }
                // A stream may be silent between two messages for any time.
                Err(BodyError::Late) if self.envelopes.finish().is_ok() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn headers_say_who_and_how_long() {
        let caller =
            Caller::of(&headers(&[("authorization", "Basic cm9vdDo="), ("connect-timeout-ms", "1500")])).unwrap();
        assert_eq!(caller.named.unwrap().name, "root");
        assert_eq!(caller.timeout, Some(Duration::from_millis(1500)));
        assert_eq!(caller.keepalive, KEEPALIVE);
        let caller = Caller::of(&headers(&[("connect-timeout-ms", "0"), ("keepalive-ping-interval", "50")])).unwrap();
        assert_eq!((caller.timeout, caller.keepalive), (None, Duration::from_secs(50)));
        assert_eq!(Caller::of(&headers(&[("connect-timeout-ms", "x")])).unwrap_err().code, Code::InvalidArgument);
        // Base64 of an unknown user's name and a colon.
        let nobody = [("authorization", "Basic bm9ib2R5LW9mLXRoYXQtbmFtZTo=")];
        assert_eq!(Caller::of(&headers(&nobody)).unwrap_err().code, Code::Unauthenticated);
    }
}
