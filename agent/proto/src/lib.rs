//! The protocol between the agent in a guest and its clients: the messages of E2B's envd, as JSON,
//! in the envelopes of the Connect protocol.
//!
//! Messages follow the JSON mapping of protobuf: names in camelCase (snake_case is read too), bytes
//! as base64, 64-bit integers as strings, enums by name, default values left out, unknown fields
//! ignored.
#![deny(missing_docs)]

pub mod api;
pub mod code;
mod entrypoint;
pub mod envelope;
pub mod filesystem;
pub mod forward;
pub mod json;
pub mod process;

pub use code::{Code, RpcError};
pub use entrypoint::{ENTRYPOINT_PATH, Entrypoint};
pub use envelope::{Envelope, EnvelopeError, Envelopes};
pub use json::{Base64, decode, encode};

/// The vsock and TCP port that agents listen on.
pub const PORT: u32 = 49983;
/// The vsock port of the host that takes notices of guests.
pub const NOTICE_PORT: u32 = 49982;

/// The media type of a call with one request and one answer.
pub const UNARY_TYPE: &str = "application/json";
/// The media type of a call with a stream.
pub const STREAM_TYPE: &str = "application/connect+json";
/// The header with the timeout of a call, in milliseconds.
pub const TIMEOUT_HEADER: &str = "connect-timeout-ms";
/// The header with the seconds of silence after which a stream sends a keepalive.
pub const KEEPALIVE_HEADER: &str = "keepalive-ping-interval";
/// The header with the access token.
pub const TOKEN_HEADER: &str = "x-access-token";

/// Maximum length of one message, in either direction.
pub const MAX_MESSAGE: usize = 4 << 20;
