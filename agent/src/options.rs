//! What the agent is started with.

use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

/// How to use it.
const USAGE: &str = "usage: clade-agent [--vsock PORT] [--unix PATH] [--tcp ADDRESS:PORT]";

/// Where the agent listens. Without an option: vsock port 49983.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A vsock port.
    pub vsock: Option<u32>,
    /// A Unix socket's path.
    pub unix: Option<PathBuf>,
    /// A TCP address. Whoever reaches it is root of the guest, unless a token is set.
    pub tcp: Option<SocketAddr>,
}

/// An argument that is not understood.
#[derive(Debug, Error)]
#[error("{argument:?} is not understood\n{USAGE}")]
pub struct UsageError {
    argument: String,
}

impl Options {
    /// Reads arguments. What the kernel gives PID 1 is no argument of ours.
    ///
    /// # Errors
    /// When one is not known, or has no value of its kind.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, UsageError> {
        let mut options = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let value = arguments.next();
            let wrong = || UsageError { argument: format!("{argument} {}", value.clone().unwrap_or_default()) };
            let text = value.as_deref().unwrap_or_default();
            match argument.as_str() {
                "--vsock" => options.vsock = Some(text.parse().map_err(|_| wrong())?),
                "--unix" if !text.is_empty() => options.unix = Some(text.into()),
                "--tcp" => options.tcp = Some(text.parse().map_err(|_| wrong())?),
                _ => return Err(wrong()),
            }
        }
        if options == Self::default() {
            options.vsock = Some(clade_agent_proto::PORT);
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_sockets() {
        let of = |line: &str| Options::parse(line.split_whitespace().map(str::to_owned));
        assert_eq!(of("").unwrap().vsock, Some(49983));
        let both = of("--unix /a --tcp 127.0.0.1:1").unwrap();
        assert_eq!((both.vsock, both.unix), (None, Some("/a".into())));
        for wrong in ["--unix", "--tcp 1", "--vsock x", "a b"] {
            of(wrong).unwrap_err();
        }
    }
}
