//! The properties of a connection to the agent.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The peer of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    /// The host, or the agent's own user, with full rights in the guest.
    Trusted,
    Other,
}

/// The properties of a connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) peer: Peer,
    /// Whether the connection survives the change of the generation that it requests.
    pub(crate) is_kept: Arc<AtomicBool>,
}
