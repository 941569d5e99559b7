//! A rule: `allow:CIDR[:PORT[-PORT]][/tcp|udp|icmp]`, or the same with `deny:`.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::MAX_RULES;
use super::frame::{DestinationPort, IpPacket, Protocol};

/// Why rules are refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum EgressError {
    /// The text cannot be parsed as a rule.
    #[error("invalid egress rule {rule:?}: {wanted}")]
    Rule {
        /// The text.
        rule: String,
        /// The expected form.
        wanted: &'static str,
    },
    /// There are too many.
    #[error("{rules} egress rules: a network device has up to {MAX_RULES}")]
    TooMany {
        /// Their number.
        rules: usize,
    },
}

/// The verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allow,
    Deny,
}

/// A rule's decision about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Is(Verdict),
    /// No match: the next rule decides.
    Next,
}

/// One rule. Its text is its saved form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EgressRule {
    verdict: Verdict,
    address: IpAddr,
    prefix: u8,
    ports: Option<RangeInclusive<u16>>,
    protocol: Option<Protocol>,
}

impl EgressRule {
    pub(super) fn allows(&self) -> bool {
        self.verdict == Verdict::Allow
    }

    pub(super) fn decide(&self, packet: &IpPacket) -> Decision {
        let protocol = self.protocol.is_none_or(|protocol| protocol == packet.protocol);
        if !protocol || !self.covers(packet.to) {
            return Decision::Next;
        }
        let decides = match (packet.port, &self.ports) {
            (_, None) => true,
            (DestinationPort::One(port), Some(ports)) => ports.contains(&port),
            // Its port is in another fragment and may be any: the packet passes only if all ports
            // are allowed.
            (DestinationPort::Any, Some(ports)) => !self.allows() || *ports == (0..=u16::MAX),
            (DestinationPort::None, Some(_)) => false,
        };
        if decides { Decision::Is(self.verdict) } else { Decision::Next }
    }

    fn covers(&self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(address)) => {
                // A shift by all bits leaves none to compare.
                (own.to_bits() ^ address.to_bits())
                    .checked_shr(32 - u32::from(self.prefix))
                    .is_none_or(|bits| bits == 0)
            }
            (IpAddr::V6(own), IpAddr::V6(address)) => (own.to_bits() ^ address.to_bits())
                .checked_shr(128 - u32::from(self.prefix))
                .is_none_or(|bits| bits == 0),
            _ => false,
        }
    }
}

/// Parses the part after the verdict and before the protocol. The error is the expected form.
fn target(text: &str) -> Result<(IpAddr, u8, Option<RangeInclusive<u16>>), &'static str> {
    const ADDRESS: &str = "an address or CIDR, IPv6 with a port in brackets: 10.0.0.0/8, [2001:db8::/32]:443";
    let (cidr, ports) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']').ok_or(ADDRESS)? {
            (cidr, "") => (cidr, None),
            (cidr, ports) => (cidr, Some(ports.strip_prefix(':').ok_or(ADDRESS)?)),
        },
        None if text.matches(':').count() > 1 => (text, None),
        None => text.split_once(':').map_or((text, None), |(cidr, ports)| (cidr, Some(ports))),
    };
    let (address, prefix) = cidr.split_once('/').map_or((cidr, None), |(address, prefix)| (address, Some(prefix)));
    let address: IpAddr = address.parse().map_err(|_| ADDRESS)?;
    let (most, bits) = match address {
        IpAddr::V4(address) => (32, u128::from(address.to_bits())),
        IpAddr::V6(address) => (128, address.to_bits()),
    };
    let prefix = match prefix {
        None => most,
        Some(prefix) => decimal(prefix)
            .and_then(|prefix| u8::try_from(prefix).ok())
            .filter(|prefix| *prefix <= most)
            .ok_or("a prefix of 0 to 32 bits, or to 128 for IPv6")?,
    };
    let host = 1u128.checked_shl(u32::from(most - prefix)).map_or(u128::MAX, |bit| bit - 1);
    if bits & host != 0 {
        return Err("no bit of the address behind the prefix");
    }
    let ports = ports.map(|ports| {
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let (first, last) = (decimal(first)?, decimal(last)?);
        (first <= last).then_some(first..=last)
    });
    match ports {
        Some(None) => Err("a port, or the first and the last of a range, from 0 to 65535"),
        Some(ports) => Ok((address, prefix, ports)),
        None => Ok((address, prefix, None)),
    }
}

/// A number of digits only: no sign.
fn decimal(text: &str) -> Option<u16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl FromStr for EgressRule {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        let wrong = |wanted| EgressError::Rule { rule: text.to_owned(), wanted };
        let (verdict, rest) = match text.split_once(':') {
            Some(("allow", rest)) => (Verdict::Allow, rest),
            Some(("deny", rest)) => (Verdict::Deny, rest),
            _ => return Err(wrong("it begins with allow: or deny:")),
        };
        let (rest, protocol) = match rest.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(Protocol::Tcp)),
            Some((rest, "udp")) => (rest, Some(Protocol::Udp)),
            Some((rest, "icmp")) => (rest, Some(Protocol::Icmp)),
            _ => (rest, None),
        };
        let (address, prefix, ports) = target(rest).map_err(wrong)?;
        if ports.is_some() && protocol == Some(Protocol::Icmp) {
            return Err(wrong("no port for icmp"));
        }
        Ok(Self { verdict, address, prefix, ports, protocol })
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.allows() { "allow" } else { "deny" };
        let cidr = format!("{}/{}", self.address, self.prefix);
        match (&self.ports, self.address) {
            (Some(_), IpAddr::V6(_)) => write!(f, "{verdict}:[{cidr}]")?,
            _ => write!(f, "{verdict}:{cidr}")?,
        }
        if let Some(ports) = &self.ports {
            write!(f, ":{}", ports.start())?;
            if ports.start() != ports.end() {
                write!(f, "-{}", ports.end())?;
            }
        }
        match self.protocol {
            Some(Protocol::Tcp) => f.write_str("/tcp"),
            Some(Protocol::Udp) => f.write_str("/udp"),
            Some(Protocol::Icmp) => f.write_str("/icmp"),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for EgressRule {
    type Error = EgressError;

    fn try_from(text: String) -> Result<Self, EgressError> {
        text.parse()
    }
}

impl From<EgressRule> for String {
    fn from(rule: EgressRule) -> Self {
        rule.to_string()
    }
}
