//! Asks the agent in a guest: runs programs, and copies files.
//!
//! The guest may be anybody's. What it answers is bounded in memory and in time, and what is no answer is a typed error.
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

/// An agent, and who asks it.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    user: Option<String>,
    token: Option<String>,
    /// How long a guest may take to take a connection.
    connecting: Duration,
    /// Whether a guest that takes no connection gets no second attempt.
    tries_once: bool,
    /// How long the head of an answer may take.
    answering: Duration,
}

impl Client {
    /// A client of the agent at `endpoint`. Nothing is connected yet: each call has a connection of its own.
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

    /// The same, for a guest that may be slow: how long it may take to take a connection, instead of 30 s,
    /// and then until an answer begins, instead of 60 s.
    #[must_use]
    pub fn with_patience(self, connecting: Duration, answering: Duration) -> Self {
        Self { connecting, answering, ..self }
    }

    /// The same, for a caller that makes new attempts by itself: each call connects once.
    #[must_use]
    pub fn with_one_attempt(self) -> Self {
        Self { tries_once: true, ..self }
    }

    /// The same, for a guest that may still boot: how long it may take to take a connection.
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
