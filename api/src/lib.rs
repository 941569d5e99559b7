//! What clients and servers of Clade share: the requests and answers of the HTTP API, its errors,
//! a client, and the runtime directory with the names, sockets and records of VMs.
//!
//! | topic | module |
//! |---|---|
//! | requests and answers | `types` |
//! | errors | `problem`, `error` |
//! | clients | `client`, `gather`, `supervisor_api` |
//! | HTTP on sockets and ports | [`http`] |
//! | names, locks, sockets and records of VMs | `runtime_dir` |
//! | events of a VM, kept if its process is killed | [`flight`] |
//! | secrets that children are made without | [`secrets`] |
//! | labels of VMs; the token of the API over TCP | `labels`, `token` |
//! | random names and keys; files replaced as a whole | `random`, `durable` |

#![deny(missing_docs)]

mod client;
mod durable;
mod error;
pub mod flight;
mod gather;
pub mod http;
mod labels;
mod object;
mod problem;
mod random;
mod runtime_dir;
pub mod secrets;
mod supervisor_api;
mod token;
mod types;

pub use client::{Client, ClientError, ListedVms, MAX_ANSWER, MAX_ATTEMPTS, retried};
pub use durable::write_durably;
pub use error::{CancelReason, CgroupError, DaemonError, HookError, HostLimitError, LONGEST_NAME, MAX_CHILDREN};
pub use gather::Gathered;
pub use labels::{Label, LabelError, Labels};
pub use problem::{Problem, ProblemKind};
pub use random::{hex, random, random_hex};
pub use runtime_dir::*;
pub use supervisor_api::{Pending, SupervisorApi};
pub use token::{Token, TokenError, is_for_this_host};
pub use types::*;
