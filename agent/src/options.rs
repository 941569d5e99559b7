//! The agent's arguments.

use std::net::SocketAddr;
use std::path::PathBuf;

use clade_agent_proto::PORT;
use clade_agent_proto::forward::FORWARD_PORT;
use thiserror::Error;

/// The usage message.
const USAGE: &str = "usage: clade-agent [--vsock PORT] [--unix PATH] [--tcp ADDRESS:PORT] [--forward-unix PATH]";

/// The agent's listeners. Without an option: vsock port 49983, and 49984 for ports of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A vsock port.
    pub vsock: Option<u32>,
    /// A Unix socket's path.
    pub unix: Option<PathBuf>,
    /// A TCP address. Its clients have root's rights in the guest, unless a token is set.
    pub tcp: Option<SocketAddr>,
    /// A vsock port for connections to TCP ports of the guest.
    pub forward_vsock: Option<u32>,
    /// A Unix socket for the same, in place of vsock.
    pub forward_unix: Option<PathBuf>,
}

/// An invalid argument.
#[derive(Debug, Error)]
#[error("{argument:?} is not understood\n{USAGE}")]
pub struct UsageError {
    argument: String,
}

impl Options {
    /// The addresses at which the host expects an agent.
    #[must_use]
    pub fn of_a_guest() -> Self {
        Self { vsock: Some(PORT), forward_vsock: Some(FORWARD_PORT), ..Self::default() }
    }

    /// Parses arguments. Arguments that the kernel passes to PID 1 do not belong to the agent.
    ///
    /// # Errors
    /// When one is unknown, or has an invalid value.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, UsageError> {
        let mut options = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let value = arguments.next();
            let wrong = || UsageError { argument: format!("{argument} {}", value.clone().unwrap_or_default()) };
            let text = value.as_deref().unwrap_or_default();
            match argument.as_str() {
                "--vsock" => {
                    options.vsock = Some(text.parse().map_err(|_| wrong())?);
                    options.forward_vsock = Some(FORWARD_PORT);
                }
                "--unix" if !text.is_empty() => options.unix = Some(text.into()),
                "--forward-unix" if !text.is_empty() => options.forward_unix = Some(text.into()),
                "--tcp" => options.tcp = Some(text.parse().map_err(|_| wrong())?),
                _ => return Err(wrong()),
            }
        }
        Ok(if options == Self::default() { Self::of_a_guest() } else { options })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_sockets() {
        let of = |line: &str| Options::parse(line.split_whitespace().map(str::to_owned));
        let own = of("").unwrap();
        assert_eq!((own.vsock, own.forward_vsock), (Some(49983), Some(49984)));
        let other = of("--vsock 7").unwrap();
        assert_eq!((other.vsock, other.forward_vsock), (Some(7), Some(49984)));
        assert_eq!(of("--unix /a --forward-unix /b").unwrap().forward_unix, Some("/b".into()));
        let both = of("--unix /a --tcp 127.0.0.1:1").unwrap();
        assert_eq!((both.vsock, both.unix), (None, Some("/a".into())));
        for wrong in ["--unix", "--forward-unix", "--tcp 1", "--vsock x", "a b"] {
            of(wrong).unwrap_err();
        }
    }
}
