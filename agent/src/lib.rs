//! The agent in a guest: processes, files and TCP ports, over vsock.
//!
//! It speaks the protocol of E2B's envd, so that the SDKs of others work with it (`docs/agent.md`). Everything runs on one
//! thread; reads and writes of files are given to a few others. Nothing that a client sends, or fails to read, makes the
//! agent's memory grow beyond its bounds.
#![deny(missing_docs)]

mod agent;
mod auth;
mod children;
mod clock;
mod connect;
mod files;
mod filesystem;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod generation;
mod http;
mod listen;
mod log;
mod metrics;
mod modules;
mod multipart;
mod network;
mod options;
mod paths;
mod process;
mod route;
mod run;
mod settings;
mod shutdown;
mod stream;
pub mod system;
mod users;

pub use agent::Agent;
pub use listen::{Listener, serve};
pub use multipart::{Multipart, MultipartError, PartEvent, boundary};
pub use options::{Options, UsageError};
pub use run::run;
