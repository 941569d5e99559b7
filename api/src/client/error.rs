//! Reasons why requests to VMs and to their supervisor fail.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use hyper::{Method, StatusCode};
use thiserror::Error;

use crate::{Problem, ProblemKind, TokenError};

/// Reason why a request to a VM failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is no socket of that name.
    #[error("there is no VM {name:?} (no socket {})", path.display())]
    NoSuchVm {
        /// The VM's name.
        name: String,
        /// The socket's path.
        path: PathBuf,
    },
    /// There is a socket, but no process listens on it.
    #[error("the process of {name:?} has died: no answer at {}", path.display())]
    Dead {
        /// The VM's name.
        name: String,
        /// The socket's path.
        path: PathBuf,
    },
    /// No supervisor answers.
    #[error("no supervisor is running: start `clade serve` (no answer at {})", path.display())]
    NoSupervisor {
        /// Its socket's path.
        path: PathBuf,
    },
    /// The socket is another user's.
    #[error("the VM {name:?} is another user's: {} may not be opened", path.display())]
    Forbidden {
        /// The VM's name.
        name: String,
        /// The socket's path.
        path: PathBuf,
    },
    /// The name has characters that a name cannot have, or is too long.
    #[error(transparent)]
    Name(#[from] crate::DaemonError),
    /// The socket failed.
    #[error("the control socket of {name:?} failed")]
    Socket {
        /// The VM's name.
        name: String,
        /// The socket's error.
        #[source]
        source: io::Error,
    },
    /// The VM's process did not answer in time.
    #[error("the process of {name:?} does not answer within {seconds} s")]
    Silent {
        /// The VM's name.
        name: String,
        /// The time limit in seconds.
        seconds: u64,
    },
    /// The HTTP connection failed.
    #[error("the VM's process did not answer")]
    Http(#[from] hyper::Error),
    /// The answer is too long.
    #[error("the VM's answer is longer than {most} bytes")]
    LongAnswer {
        /// The limit in bytes.
        most: usize,
    },
    /// The answer has more or less memory than was asked for.
    #[error("the process of {name:?} has answered {got} bytes for {length}")]
    ShortMemory {
        /// The VM's name.
        name: String,
        /// Bytes requested.
        length: usize,
        /// Bytes received.
        got: usize,
    },
    /// The answer is not of the expected form.
    #[error("the VM's answer could not be read")]
    Answer(#[from] serde_json::Error),
    /// The VM's process refuses the request.
    #[error("{}", problem.detail)]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The server's answer.
        problem: Box<Problem>,
    },
    /// `CLADE_API` is not an address.
    #[error("CLADE_API is {value:?}: an address as in tcp://127.0.0.1:8080 is wanted")]
    Address {
        /// Its value.
        value: String,
    },
    /// `CLADE_TOKEN_FILE` is not set.
    #[error("CLADE_API is set, and CLADE_TOKEN_FILE is not: it names the file of the token")]
    NoToken,
    /// The token cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// No supervisor answers at the address.
    #[error("no answer at {address}")]
    NoAnswer {
        /// The address.
        address: SocketAddr,
        /// The socket's error.
        #[source]
        source: io::Error,
    },
    /// The runtime directory cannot be read.
    #[error("{} cannot be read", path.display())]
    Directory {
        /// The directory's path.
        path: PathBuf,
        /// The error of reading it.
        #[source]
        source: io::Error,
    },
}

impl ClientError {
    /// Returns the error of an answer with an error status. An answer of HTTP itself, as to a head
    /// that is too large, has no problem document.
    #[must_use]
    pub fn refused(status: StatusCode, body: &[u8]) -> Self {
        let problem = serde_json::from_slice(body).unwrap_or_else(|_| Problem {
            kind: "about:blank".to_owned(),
            title: status.to_string(),
            status: status.as_u16(),
            detail: status.to_string(),
        });
        Self::Refused { status: status.as_u16(), problem: Box::new(problem) }
    }

    /// Returns the kind of problem that this error is to a client of the supervisor.
    pub fn problem(&self) -> ProblemKind {
        match self {
            Self::NoSuchVm { .. } | Self::Dead { .. } => ProblemKind::NoSuchVm,
            Self::Name(error) => error.problem(),
            Self::Forbidden { .. } => ProblemKind::Forbidden,
            Self::Refused { problem, .. } => ProblemKind::of_urn(&problem.kind).unwrap_or(ProblemKind::Internal),
            Self::Silent { .. } => ProblemKind::VmSilent,
            // The process ended during the connection.
            Self::Socket { .. } if self.is_lost() => ProblemKind::VmGone,
            // The process ended without an answer.
            Self::Http(_) | Self::Answer(_) | Self::LongAnswer { .. } | Self::ShortMemory { .. } => ProblemKind::VmGone,
            // A supervisor's own client has no such address.
            Self::Address { .. } | Self::NoToken | Self::Token(_) | Self::NoAnswer { .. } => ProblemKind::Internal,
            Self::NoSupervisor { .. } | Self::Socket { .. } | Self::Directory { .. } => ProblemKind::Internal,
        }
    }

    /// Returns whether the same request of `method` may succeed in a moment, and is harmless to
    /// repeat.
    pub(super) fn may_pass(&self, method: &Method) -> bool {
        let Self::Refused { problem, .. } = self else { return false };
        match ProblemKind::of_urn(&problem.kind) {
            // Refused before any work.
            Some(ProblemKind::TooMany | ProblemKind::NoThread) => true,
            // The VM's process may still do it.
            Some(ProblemKind::VmSilent) => method.is_safe(),
            _ => false,
        }
    }

    /// Returns whether the process ended without an answer, or is about to end.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Http(_) => true,
            Self::Socket { source, .. } => {
                matches!(source.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
            }
            Self::Refused { problem, .. } => ProblemKind::of_urn(&problem.kind) == Some(ProblemKind::Ending),
            _ => false,
        }
    }

    /// Returns the error of a failed connection to the socket of `name` at `path`.
    #[must_use]
    pub fn unreachable(name: &str, path: PathBuf, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NoSuchVm { name, path },
            io::ErrorKind::ConnectionRefused => Self::Dead { name, path },
            io::ErrorKind::PermissionDenied => Self::Forbidden { name, path },
            _ => Self::Socket { name, source },
        }
    }
}
