//! E2B's API over the VMs of a supervisor, so that its SDKs work unchanged.
//!
//! A *template* is a checkpoint, a *sandbox* is a VM that was forked from one, and a *snapshot* is a
//! checkpoint of a sandbox. What E2B has no word for is asked of the supervisor, which this is a
//! client of. It keeps one file for each sandbox beside the VMs' sockets: what its owner wrote on
//! it, and when it ends.
//!
//! One address takes both: calls of the API, and requests for a sandbox's port. The latter name the
//! sandbox in `E2b-Sandbox-Id` or in `Host`, and go to the agent in the guest.
#![deny(missing_docs)]

mod control;
mod error;
mod gateway;
mod idempotency;
mod keys;
mod lifetime;
mod listen;
mod ports;
mod rate;
mod records;
mod rules;
mod sandboxes;
mod secret;
mod snapshots;
mod wire;

pub use gateway::{Gateway, OpenError, Options};
pub use keys::{ApiKeys, KeyInfo, KeysError, Scope};
pub use listen::ListenError;
