//! E2B's API over the VMs of a supervisor, so that its SDKs work unchanged.
//!
//! A *template* is a checkpoint, made by hand or built; a built one is a snapshot on the disk, too.
//! A *sandbox* is a VM that was forked from one, and a *snapshot* is a checkpoint of a sandbox.
//! A gateway asks the supervisor through [`clade_api::SupervisorApi`], in the same process without HTTP.
//! The supervisor holds the state beyond E2B's terms. The gateway keeps one file for each sandbox beside
//! the VMs' sockets, with its owner's metadata and its end.
//!
//! One address takes both: calls of the API, and requests for a sandbox's port. The latter name the
//! sandbox in `E2b-Sandbox-Id` or in `Host`, and go to the agent in the guest or to a TCP port
//! there.
#![deny(missing_docs)]

mod built;
mod call_permits;
mod change_client;
mod connection_limits;
mod control;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod gateway;
mod headers;
mod idempotency;
mod keys;
mod lifetime;
mod listen;
mod making;
#[cfg(test)]
mod owners_tests;
mod ports;
mod proxy;
mod quotas;
mod rate;
mod reconcile;
mod records;
mod rules;
mod sandboxes;
mod seats;
mod secret;
mod snapshots;
mod source;
mod templates;
#[cfg(test)]
mod testing;
mod tls;
mod to_the_end;
mod tunnel;
mod wire;

pub use gateway::{Gateway, GatewayFiles, GatewayOpenError, Options};
pub use keys::{ApiKeys, KeyInfo, KeysError, Scope};
pub use listen::{BoundPort, ListenError};
pub use quotas::{QuotaError, Quotas};
pub use templates::{
    Draft, TEMPLATES_VARIABLE, Template, TemplateError, TemplateSpec, TemplateStore, check_template_name, user_data_dir,
};
pub use tls::{Tls, TlsError, TlsFiles};
