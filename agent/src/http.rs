//! Bodies of requests and answers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use clade_agent_proto::api::HttpError;
use clade_agent_proto::{Code, MAX_MESSAGE, RpcError, encode};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};
use thiserror::Error;
use tokio::sync::{SemaphorePermit, mpsc};

use crate::agent::Agent;

/// Maximum size of a body that needs no turn.
const SMALL: usize = 16 << 10;
/// Timeout for the next piece of a body, and for all of a message.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// An answer.
pub(crate) type Reply = Response<Answer>;

/// An answer's body.
#[derive(Debug)]
pub(crate) enum Answer {
    Whole(Option<Bytes>),
    /// Pieces as they arrive. An error cuts the connection, so that a client does not mistake a
    /// part for the whole.
    Pieces(mpsc::Receiver<io::Result<Bytes>>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Pieces(pieces) => pieces.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Pieces(_) => SizeHint::default(),
        }
    }
}

/// Why the body of a request is not available.
#[derive(Debug, Error)]
pub(crate) enum BodyError {
    #[error("a message of more than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("the request's body has not come within {} s", BODY_TIMEOUT.as_secs())]
    Late,
    #[error("the request's body cannot be read")]
    Broken(#[source] hyper::Error),
}

impl From<BodyError> for RpcError {
    fn from(error: BodyError) -> Self {
        let code = match error {
            BodyError::TooLong => Code::ResourceExhausted,
            BodyError::Late => Code::DeadlineExceeded,
            BodyError::Broken(_) => Code::Canceled,
        };
        Self::new(code, error)
    }
}

/// The next piece of a body; `None` at its end.
pub(crate) async fn piece(body: &mut Incoming) -> Result<Option<Bytes>, BodyError> {
    loop {
        let next = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
        let Some(frame) = tokio::time::timeout(BODY_TIMEOUT, next).await.map_err(|_| BodyError::Late)? else {
            return Ok(None);
        };
        // Trailers are ignored.
        if let Ok(data) = frame.map_err(BodyError::Broken)?.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
}

/// A permit for a large body in memory. Taken before the body is read, so that bodies with a permit
/// can be completed.
pub(crate) async fn turn<'a>(
    agent: &'a Agent,
    held: &mut Option<SemaphorePermit<'a>>,
    length: usize,
) -> Result<(), RpcError> {
    if length > SMALL && held.is_none() {
        // The semaphore is never closed.
        *held = Some(agent.large.acquire().await.map_err(RpcError::internal)?);
    }
    Ok(())
}

/// All of a body, which has to come within [`BODY_TIMEOUT`]: a client that sends it byte by byte would keep a permit.
pub(crate) async fn whole(agent: &Agent, body: &mut Incoming) -> Result<Vec<u8>, RpcError> {
    tokio::time::timeout(BODY_TIMEOUT, pieces(agent, body)).await.map_err(|_| BodyError::Late)?
}

async fn pieces(agent: &Agent, body: &mut Incoming) -> Result<Vec<u8>, RpcError> {
    let (mut bytes, mut held) = (Vec::new(), None);
    while let Some(data) = piece(body).await? {
        if bytes.len() + data.len() > MAX_MESSAGE {
            return Err(BodyError::TooLong.into());
        }
        turn(agent, &mut held, bytes.len() + data.len()).await?;
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// An answer with a text.
pub(crate) fn reply(status: StatusCode, media_type: &'static str, bytes: Vec<u8>) -> Reply {
    let mut reply = Response::new(Answer::Whole((!bytes.is_empty()).then(|| bytes.into())));
    *reply.status_mut() = status;
    let headers = reply.headers_mut();
    if status == StatusCode::NO_CONTENT {
        headers.remove(CONTENT_LENGTH);
    } else {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    reply
}

/// An answer with a message.
pub(crate) fn json<T: serde::Serialize>(message: &T) -> Reply {
    reply(StatusCode::OK, clade_agent_proto::UNARY_TYPE, encode(message))
}

/// An answer without a body.
pub(crate) fn no_content() -> Reply {
    reply(StatusCode::NO_CONTENT, "", Vec::new())
}

/// The answer to a failed plain request.
pub(crate) fn http_error(status: StatusCode, message: impl std::fmt::Display) -> Reply {
    let error = HttpError { code: status.as_u16(), message: message.to_string() };
    reply(status, clade_agent_proto::UNARY_TYPE, encode(&error))
}

/// The text of a header.
pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// A parameter of a request's query, percent-decoded.
pub(crate) fn query(query: Option<&str>, name: &str) -> Option<String> {
    query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (percent_decode(key) == name).then(|| percent_decode(value))
    })
}

/// `+` and `%20` are blanks. Invalid escapes are kept as they are.
fn percent_decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        bytes.push(match first {
            b'+' => b' ',
            b'%' => match after {
                [high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                    rest = after;
                    hex(*high) << 4 | hex(*low)
                }
                _ => b'%',
            },
            other => *other,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> u8 {
    (digit as char).to_digit(16).unwrap_or_default() as u8
}

/// Shared by the tasks of a request.
pub(crate) type Shared = Arc<Agent>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let of = |text: &str, name: &str| query(Some(text), name);
        assert_eq!(of("path=%2Fa%20b+c&username=ann", "path").as_deref(), Some("/a b c"));
        assert_eq!(of("path=%2Fa&username=ann", "username").as_deref(), Some("ann"));
        assert_eq!(of("path", "path").as_deref(), Some(""));
        assert_eq!(of("path=%4", "path").as_deref(), Some("%4"));
        assert_eq!(of("path=%zz%", "path").as_deref(), Some("%zz%"));
        assert_eq!(of("other=1", "path"), None);
    }
}
