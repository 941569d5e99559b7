//! Networks without an interface of the host's: [passt](https://passt.top) takes the packets, and
//! makes connections of its own of them.
//!
//! It needs no privileges, so neither has who starts the VM. Each VM has one, which ends when its
//! socket is closed. All guests see the same network:
//!
//! | address | what |
//! |---|---|
//! | [`GUEST`] | the guest |
//! | [`GATEWAY`] | passt, which leads to nothing of the host's loopback |
//! | [`RESOLVER`] | the host's first name server |
//!
//! A child has a passt of its own. Connections of its parent are unknown to that.

use std::io;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use clade_io::PacketStream;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The guest's address, which it is given by DHCP.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// Bits of the network's part of it.
pub const PREFIX: u8 = 24;
/// The guest's way out.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The guest's name server.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The gateway's Ethernet address, which QEMU's user network has too. A guest that draws the same is one of
/// 2^46.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";
/// The program.
const PASST: &str = "passt";
/// Runs it with standard input as descriptor 3: in the background it has no standard input.
const AS_FD_3: &str = r#"exec passt "$@" 3<&0 </dev/null"#;
/// What a shell ends with if there is no such program.
const NOT_FOUND: i32 = 127;
/// Most ports of the host's that lead to one guest.
pub const MAX_FORWARDS: usize = 64;
/// Bytes of what the program says that are looked at.
const MAX_SAID: usize = 300;

/// A network device on a network of its own, by passt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserNet {
    /// TCP ports that lead to the guest. Children have none of them: a port is one VM's.
    #[serde(default)]
    pub forward: Vec<PortForward>,
}

/// A TCP port of the host's loopback address that leads to one of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortForward {
    /// The host's.
    pub host: u16,
    /// The guest's.
    pub guest: u16,
}

/// Why there is no network by passt.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UserNetError {
    /// The program is not there.
    #[error("there is no passt: install it (Debian: passt), or give the network device a TAP interface")]
    Missing,
    /// Nothing can be run.
    #[error("passt cannot be run")]
    Start(#[source] io::Error),
    /// It does not begin.
    #[error("passt has ended with {code}{}{said}", if said.is_empty() { "" } else { ": " })]
    Refused {
        /// Its exit code, or -1 if a signal has ended it.
        code: i32,
        /// The end of what it has said.
        said: String,
    },
    /// A port is 0, is there twice, or there are too many.
    #[error("port {host}:{guest}: ports are 1 to 65535, each of the host's once, {MAX_FORWARDS} at most")]
    Forward {
        /// The host's.
        host: u16,
        /// The guest's.
        guest: u16,
    },
}

impl UserNet {
    /// Refuses ports that cannot be.
    ///
    /// # Errors
    /// [`UserNetError::Forward`], with the first of them.
    pub fn check(&self) -> Result<(), UserNetError> {
        for (at, PortForward { host, guest }) in self.forward.iter().copied().enumerate() {
            let is_again = self.forward[..at].iter().any(|other| other.host == host);
            if host == 0 || guest == 0 || is_again || at >= MAX_FORWARDS {
                return Err(UserNetError::Forward { host, guest });
            }
        }
        Ok(())
    }

    /// The same for a child.
    #[must_use]
    pub fn of_child(&self) -> Self {
        Self::default()
    }

    /// Starts the program, and returns when it takes packets. It ends when the result is dropped, in
    /// whatever process.
    ///
    /// # Errors
    /// When the program is not there, or refuses: a port may be another's.
    pub(crate) fn start(&self) -> Result<PacketStream, UserNetError> {
        self.check()?;
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = pair.map_err(|errno| UserNetError::Start(errno.into()))?;
        let mut command = Command::new("sh");
        // Not by a hook between fork and exec: with one the standard library copies this process, and
        // so its guest memory, under what devices have pinned. This spawns it without.
        command
            .args(["-c", AS_FD_3, PASST])
            .args(self.args())
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // It goes on in the background when it has begun.
        let output = command.output().map_err(UserNetError::Start)?;
        match output.status.code() {
            Some(0) => return Ok(PacketStream::new(ours)),
            Some(NOT_FOUND) => return Err(UserNetError::Missing),
            _ => {}
        }
        let said = String::from_utf8_lossy(&output.stderr);
        // Its log is not to be had everywhere.
        let lines = said.lines().filter(|line| !line.is_empty() && !line.contains("syslog"));
        let said: String = lines.collect::<Vec<_>>().join("; ").chars().take(MAX_SAID).collect();
        Err(UserNetError::Refused { code: output.status.code().unwrap_or(-1), said })
    }

    fn args(&self) -> Vec<String> {
        let forward = |PortForward { host, guest }: &PortForward| format!("127.0.0.1/{host}:{guest}");
        let mut args = vec!["--quiet".to_owned(), "--ipv4-only".to_owned()];
        let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
        add("--fd", "3".to_owned());
        add("--address", GUEST.to_string());
        add("--netmask", PREFIX.to_string());
        add("--gateway", GATEWAY.to_string());
        add("--mac-addr", GATEWAY_MAC.to_owned());
        add("--dns-forward", RESOLVER.to_string());
        add("--search", "none".to_owned());
        add("--udp-ports", "none".to_owned());
        for port in &self.forward {
            add("--tcp-ports", forward(port));
        }
        if self.forward.is_empty() {
            add("--tcp-ports", "none".to_owned());
        }
        // The gateway would lead to whatever listens on the host's loopback address.
        args.push("--no-map-gw".to_owned());
        args
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_cannot_be_are_named() {
        let of = |ports: &[(u16, u16)]| UserNet {
            forward: ports.iter().map(|(host, guest)| PortForward { host: *host, guest: *guest }).collect(),
        };
        of(&[(8080, 80), (8081, 80)]).check().unwrap();
        let many: Vec<(u16, u16)> = (1..=MAX_FORWARDS as u16 + 1).map(|port| (port, 80)).collect();
        of(&many[1..]).check().unwrap();
        for (ports, named) in
            [(&[(0, 80)][..], "0:80"), (&[(80, 0)], "80:0"), (&[(9, 1), (9, 2)], "9:2"), (&many, "65:80")]
        {
            let refused = of(ports).start().unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }
}
