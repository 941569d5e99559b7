//! The agent in a guest: processes, files and TCP ports, over vsock.
//!
//! It speaks the protocol of E2B's envd, so that the SDKs made for envd work with it
//! (`docs/agent.md`). Everything runs on one thread, except for reads and writes of files, which
//! use a few others. The agent's memory is bounded for any client, even for one that floods or does
//! not read.
#![deny(missing_docs)]

mod agent;
mod auth;
mod calls;
mod children;
mod clock;
mod connect;
mod connection;
mod files;
mod filesystem;
mod fork_hooks;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod generation;
mod http;
mod layer;
mod listen;
mod lock;
mod log;
mod metrics;
mod modules;
mod multipart;
mod network;
mod notice;
mod options;
mod paths;
mod process;
mod program;
mod route;
mod run;
mod settings;
mod shutdown;
mod stream;
pub mod system;
mod users;
mod vfork;

pub use agent::Agent;
pub use listen::{Listener, serve};
pub use multipart::{Multipart, MultipartError, PartEvent, boundary};
pub use options::{Options, UsageError};
pub use run::run;
