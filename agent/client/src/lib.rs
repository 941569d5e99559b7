//! The client of the agent in a guest: runs programs, and copies files.
//!
//! The guest may be hostile. Its answers are bounded in memory and in time, and an invalid answer
//! is a typed error.
#![deny(missing_docs)]

mod connection;
mod error;
mod files;
mod process;
mod rpc;
mod socket;

pub use clade_agent_proto as proto;
pub use connection::Endpoint;
pub use error::ClientError;
pub use files::{Download, Upload};
pub use process::{Input, Process};
pub use rpc::Messages;
pub use socket::Socket;

use std::time::Duration;

use connection::{CONNECT_TIMEOUT, HEAD_TIMEOUT};

/// An agent, and the caller's credentials.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    user: Option<String>,
    token: Option<String>,
    /// Timeout for the guest to accept a connection.
    connecting: Duration,
    /// Whether a guest that does not accept a connection gets no second attempt.
    tries_once: bool,
    /// Timeout for the head of an answer.
    answering: Duration,
}

impl Client {
    /// A client of the agent at `endpoint`. Does not connect yet: each call has a connection of its
    /// own.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        let (connecting, answering) = (CONNECT_TIMEOUT, HEAD_TIMEOUT);
        Self { endpoint, user: None, token: None, connecting, tries_once: false, answering }
    }

    /// The same, for a user of the guest.
    #[must_use]
    pub fn with_user(self, user: Option<String>) -> Self {
        Self { user, ..self }
    }

    /// The same, with timeouts for a slow guest: for accepting a connection, instead of 30 s, and
    /// then for the beginning of an answer, instead of 60 s.
    #[must_use]
    pub fn with_patience(self, connecting: Duration, answering: Duration) -> Self {
        Self { connecting, answering, ..self }
    }

    /// The same, for a caller that retries by itself: each call connects once.
    #[must_use]
    pub fn with_one_attempt(self) -> Self {
        Self { tries_once: true, ..self }
    }

    /// The same, with a timeout for accepting a connection, for a guest that may still boot.
    #[must_use]
    pub fn with_wait(self, connecting: Duration) -> Self {
        Self { connecting, ..self }
    }

    /// The same, with the agent's token.
    #[must_use]
    pub fn with_token(self, token: Option<String>) -> Self {
        Self { token, ..self }
    }
}
