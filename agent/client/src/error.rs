//! Errors.

use std::io;
use std::time::Duration;

use clade_agent_proto::{EnvelopeError, RpcError};
use thiserror::Error;

/// Why a call failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The socket to the guest does not exist, or has no listener.
    #[error("the guest's socket {at} cannot be connected to")]
    Socket {
        /// The socket.
        at: String,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// There is no agent: the guest refuses the connection, or does not answer it.
    #[error("no agent answers in the guest within {:.1} s: {why}", waited.as_secs_f64())]
    NoAgent {
        /// The guest's behaviour.
        why: &'static str,
        /// How long the client waited for an agent.
        waited: Duration,
    },
    /// A TCP port of the guest has no listener.
    #[error("port {port} of the guest is not open: {why}")]
    PortClosed {
        /// The port.
        port: u16,
        /// The agent's reason: printable characters of bounded length.
        why: String,
    },
    /// The agent does not connect to a TCP port of the guest.
    #[error("the agent does not connect to port {port}: {why}")]
    PortRefused {
        /// The port.
        port: u16,
        /// The agent's reason, as above.
        why: String,
    },
    /// The connection broke.
    #[error("the agent's connection has failed")]
    Http(#[from] hyper::Error),
    /// The connection has ended before the answer did.
    #[error(
        "the agent's connection has ended within the answer: the agent or its VM has ended, or the VM is another now"
    )]
    Lost(#[source] hyper::Error),
    /// The guest was silent for too long, or did not send a whole message.
    #[error("the agent has not answered for {} s", time.as_secs())]
    Silent {
        /// The timeout.
        time: Duration,
    },
    /// The data received is not an answer.
    #[error("the agent's answer cannot be read: {what}")]
    Answer {
        /// Its form.
        what: String,
    },
    /// The stream of answers is broken.
    #[error("the agent's answer cannot be read")]
    Envelope(#[from] EnvelopeError),
    /// The stream ended before its last message.
    #[error("the agent's answer ends too early")]
    Truncated,
    /// The agent refused the call, or failed.
    #[error(transparent)]
    Rpc(RpcError),
    /// The same for a file.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Why.
        message: String,
    },
    /// The request cannot be written as HTTP.
    #[error("the request cannot be sent")]
    Request(#[source] hyper::http::Error),
}

/// Most characters of a guest's message.
const MAX_MESSAGE_CHARS: usize = 1000;

/// Returns the beginning of a guest's message, without control characters: it is shown on terminals and kept.
pub(crate) fn message_of_guest(message: &str) -> String {
    let plain = message.chars().filter(|c| !c.is_control() || *c == '\n');
    plain.take(MAX_MESSAGE_CHARS).collect()
}

impl From<RpcError> for ClientError {
    fn from(RpcError { code, message }: RpcError) -> Self {
        Self::Rpc(RpcError { code, message: message_of_guest(&message) })
    }
}

impl ClientError {
    /// Converts the error of a sent request, or of its answer.
    pub(crate) fn of_connection(error: hyper::Error) -> Self {
        let cause = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<io::Error>());
        let is_cut = cause.is_some_and(|cause| {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            matches!(cause.kind(), ConnectionReset | BrokenPipe | UnexpectedEof)
        });
        let is_lost = is_cut || error.is_incomplete_message() || error.is_canceled() || error.is_closed();
        if is_lost { Self::Lost(error) } else { Self::Http(error) }
    }

    /// Whether a new attempt to connect may succeed: the guest's device exists, and no data was
    /// sent.
    pub(crate) fn may_pass(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, WouldBlock};
        match self {
            Self::NoAgent { .. } => true,
            // The device's backlog is full, or the device has closed the connection before its
            // first use.
            Self::Socket { source, .. } => matches!(source.kind(), WouldBlock | ConnectionReset | BrokenPipe),
            _ => false,
        }
    }

    /// The same error, after all attempts.
    pub(crate) fn after(self, waited: Duration) -> Self {
        match self {
            Self::NoAgent { why, .. } => Self::NoAgent { why, waited },
            other => other,
        }
    }

    pub(crate) fn answer(what: impl std::fmt::Display) -> Self {
        // The length of a guest's text is limited.
        Self::Answer { what: what.to_string().chars().take(200).collect() }
    }
}
