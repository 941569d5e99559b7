//! Options that describe devices as `key=value`: `--net` and `--vsock`.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;

use clade_devices::virtio::limiter::{Limits, Rate};
use clade_devices::virtio::net::{MAX_PAIRS, Mac};
use clade_devices::virtio::vsock::{FIRST_GUEST_CID, VsockOptions};
use thiserror::Error;

use crate::commands::units::parse_size;
use clade_vmm::vm::{NetChoice, NetSpec, PortForward, VsockChoice};

const NET: &str = "tap=, user, forward=, mac=, queues=, rx-bytes=, rx-bytes-burst=, rx-packets=, rx-packets-burst=, tx-bytes=, tx-bytes-burst=, tx-packets=, tx-packets-burst=";

/// Reason why the description of a device is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum DeviceArgError {
    /// An option is unknown.
    #[error("unknown option {option:?} of {what}: {known}")]
    Unknown { what: &'static str, option: String, known: &'static str },
    /// An option has a bad value.
    #[error("invalid value {value:?} for {key} of {what}: {wanted}")]
    Value { what: &'static str, key: String, value: String, wanted: &'static str },
    /// A required option is missing.
    #[error("{text:?} is not {what}: {needs}")]
    Missing { what: &'static str, text: String, needs: &'static str },
    /// A burst without a rate.
    #[error("{key} of a network device needs {needs}")]
    Burst { key: String, needs: String },
}

/// One `key=value`.
#[derive(Clone, Copy)]
struct Pair<'a> {
    what: &'static str,
    option: &'a str,
    key: &'a str,
    value: &'a str,
}

impl<'a> Pair<'a> {
    fn all(what: &'static str, text: &'a str) -> impl Iterator<Item = Self> {
        text.split(',').map(move |option| {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            Self { what, option, key, value }
        })
    }

    fn bad(self, wanted: &'static str) -> DeviceArgError {
        DeviceArgError::Value { what: self.what, key: self.key.to_owned(), value: self.value.to_owned(), wanted }
    }

    fn unknown(self, known: &'static str) -> DeviceArgError {
        DeviceArgError::Unknown { what: self.what, option: self.option.to_owned(), known }
    }

    fn text(self, wanted: &'static str) -> Result<String, DeviceArgError> {
        if self.value.is_empty() { Err(self.bad(wanted)) } else { Ok(self.value.to_owned()) }
    }

    fn mac(self) -> Result<Mac, DeviceArgError> {
        self.value.parse().map_err(|_| self.bad("a unicast address like 02:00:00:00:00:01"))
    }

    fn cid(self) -> Result<u64, DeviceArgError> {
        let guests = FIRST_GUEST_CID..u64::from(u32::MAX);
        self.value.parse().ok().filter(|cid| guests.contains(cid)).ok_or_else(|| self.bad("3 to 4294967294"))
    }
}

/// Rates and bursts of one direction, each as `[rate, burst]`.
#[derive(Default)]
struct Direction {
    bytes: [Option<u64>; 2],
    packets: [Option<u64>; 2],
}

impl Direction {
    /// Parses an option of this direction. Returns false if `key` is not one.
    fn take(&mut self, key: &str, pair: Pair<'_>) -> Result<bool, DeviceArgError> {
        let place = match key {
            "bytes" => &mut self.bytes[0],
            "bytes-burst" => &mut self.bytes[1],
            "packets" => &mut self.packets[0],
            "packets-burst" => &mut self.packets[1],
            _ => return Ok(false),
        };
        let amount = parse_size(pair.value).ok().filter(|amount| *amount > 0);
        *place = Some(amount.ok_or_else(|| pair.bad("a number above 0, as in 100M"))?);
        Ok(true)
    }

    fn limits(self, prefix: &str) -> Result<Limits, DeviceArgError> {
        let rate = |what: &str, [rate, burst]: [Option<u64>; 2]| match (rate, burst) {
            (Some(rate), burst) => Ok(Some(Rate { burst, ..Rate::per_second(rate) })),
            (None, None) => Ok(None),
            (None, Some(_)) => Err(DeviceArgError::Burst {
                key: format!("{prefix}-{what}-burst="),
                needs: format!("{prefix}-{what}="),
            }),
        };
        Ok(Limits { bytes: rate("bytes", self.bytes)?, operations: rate("packets", self.packets)? })
    }
}

/// Parses a network device.
pub(crate) fn parse_net(text: &str) -> Result<NetSpec, DeviceArgError> {
    let what = "a network device";
    let mut net = NetSpec::new("");
    let (mut receive, mut send) = (Direction::default(), Direction::default());
    for pair in Pair::all(what, text) {
        match pair.key {
            "tap" => net.tap = pair.text("the name of an interface, or a pattern like web%d")?,
            "user" if pair.option == "user" => drop(net.user.get_or_insert_default()),
            "forward" => {
                let port = |text: &str| text.parse().ok().filter(|port| *port > 0);
                let ports = pair.value.split_once(':').and_then(|(host, guest)| Some((port(host)?, port(guest)?)));
                let (host, guest) = ports.ok_or_else(|| pair.bad("HOST:GUEST, two ports, as in 8080:80"))?;
                net.user.get_or_insert_default().forward.push(PortForward { host, guest });
            }
            "mac" => net.mac = Some(pair.mac()?),
            "queues" => {
                let queues = pair.value.parse().ok().filter(|queues| (1..=MAX_PAIRS).contains(queues));
                net.queues = queues.ok_or_else(|| pair.bad("1 to 8"))?;
            }
            key => {
                let known = match (key.strip_prefix("rx-"), key.strip_prefix("tx-")) {
                    (Some(key), _) => receive.take(key, pair)?,
                    (_, Some(key)) => send.take(key, pair)?,
                    _ => false,
                };
                if !known {
                    return Err(pair.unknown(NET));
                }
            }
        }
    }
    if net.tap.is_empty() == net.user.is_none() {
        return Err(DeviceArgError::Missing {
            what,
            text: text.to_owned(),
            needs: "one of tap=NAME and user is needed",
        });
    }
    (net.receive, net.send) = (receive.limits("rx")?, send.limits("tx")?);
    Ok(net)
}

/// Returns a CID for a VM whose user names none. All VMs of the host share the CIDs, whatever their
/// directory, and children take the numbers behind their parent's. So the numbers are random, and
/// far from each other.
pub(crate) fn random_cid() -> u64 {
    const FIRST: u64 = 0x1000_0000;
    const COUNT: u64 = 0x6000_0000;
    // The keys of a hasher are random in each process.
    FIRST + RandomState::new().build_hasher().finish() % COUNT
}

/// Parses a socket device.
pub(crate) fn parse_vsock(text: &str) -> Result<VsockOptions, DeviceArgError> {
    let VsockChoice { cid, socket } = parse_vsock_choice(text)?;
    let needs = "socket=PATH is needed";
    let missing = || DeviceArgError::Missing { what: "a socket device", text: text.to_owned(), needs };
    Ok(VsockOptions { cid: cid.unwrap_or_else(random_cid), socket: socket.ok_or_else(missing)? })
}

/// Parses the choices for a child's socket device.
pub(crate) fn parse_vsock_choice(text: &str) -> Result<VsockChoice, DeviceArgError> {
    let mut choice = VsockChoice::default();
    for pair in Pair::all("a socket device", text) {
        match pair.key {
            "cid" => choice.cid = Some(pair.cid()?),
            "socket" => choice.socket = Some(PathBuf::from(pair.text("a path")?)),
            _ => return Err(pair.unknown("cid=, socket=")),
        }
    }
    Ok(choice)
}

/// Parses the choices for a child's network device.
pub(crate) fn parse_net_choice(text: &str) -> Result<NetChoice, DeviceArgError> {
    let mut choice = NetChoice::default();
    for pair in Pair::all("a child's network device", text) {
        match pair.key {
            "tap" => choice.tap = Some(pair.text("the name of an interface, or a pattern like web%d")?),
            "mac" => choice.mac = Some(pair.mac()?),
            _ => return Err(pair.unknown("tap=, mac=")),
        }
    }
    Ok(choice)
}

#[cfg(test)]
mod tests {
    use clade_vmm::vm::UserNet;

    use super::*;

    #[test]
    fn everything_can_be_said() {
        let net = parse_net(
            "tap=web%d,mac=02:00:00:00:00:07,queues=4,rx-bytes=100M,rx-bytes-burst=1G,tx-packets=500,tx-packets-burst=9",
        )
        .unwrap();
        assert_eq!((net.tap.as_str(), net.mac, net.queues), ("web%d", Some(Mac([2, 0, 0, 0, 0, 7])), 4));
        let bytes = net.receive.bytes.unwrap();
        assert_eq!((bytes.per_second, bytes.burst, net.receive.operations), (100 << 20, Some(1 << 30), None));
        let packets = net.send.operations.unwrap();
        assert_eq!((packets.per_second, packets.burst, net.send.bytes), (500, Some(9), None));
        assert_eq!(parse_net("tap=x").unwrap(), NetSpec::new("x"));
        assert_eq!(parse_net("user").unwrap(), NetSpec::by_passt(UserNet::default()));
        let forward = vec![PortForward { host: 8080, guest: 80 }, PortForward { host: 2222, guest: 22 }];
        assert_eq!(parse_net("user,forward=8080:80,forward=2222:22").unwrap().user, Some(UserNet { forward }));
        let vsock = parse_vsock("socket=/run/a.vsock,cid=17").unwrap();
        assert_eq!(vsock, VsockOptions { cid: 17, socket: "/run/a.vsock".into() });
        let others = [(); 2].map(|()| parse_vsock("socket=/run/a.vsock").unwrap().cid);
        assert!(
            others[0].abs_diff(others[1]) > 1
                && others.iter().all(|cid| (0x1000_0000..u64::from(u32::MAX)).contains(cid))
        );
        assert_eq!(parse_vsock_choice("cid=17").unwrap(), VsockChoice { cid: Some(17), socket: None });
        assert_eq!(parse_net_choice("tap=y").unwrap(), NetChoice { tap: Some("y".into()), mac: None });
    }

    #[test]
    fn what_is_wrong_is_named() {
        let nets = [
            ("", "\"\""),
            ("web0", "web0"),
            ("mac=02:00:00:00:00:07", "tap=NAME"),
            ("user,tap=x", "one of"),
            ("user=yes", "user=yes"),
            ("user,forward=80", "8080:80"),
            ("user,forward=0:80", "0:80"),
            ("user,forward=80:65536", "65536"),
            ("tap=", "the name of an interface"),
            ("tap=x,mac=03:00:00:00:00:07", "03:00:00:00:00:07"),
            ("tap=x,mac=1", "\"1\""),
            ("tap=x,queues=0", "\"0\""),
            ("tap=x,queues=9", "1 to 8"),
            ("tap=x,rx-bytes=fast", "fast"),
            ("tap=x,tx-packets=0", "\"0\""),
            ("tap=x,tx-bytes-burst=5", "tx-bytes="),
            ("tap=x,rx-speed=5", "rx-speed=5"),
        ];
        let vsocks = [
            ("cid=3", "socket=PATH"),
            ("cid=2,socket=/x", "\"2\""),
            ("cid=4294967295,socket=/x", "4294967295"),
            ("cid=-1,socket=/x", "-1"),
            ("cid=3,socket=", "a path"),
            ("cid=3,socket=/x,port=1", "port=1"),
        ];
        let nets = nets.map(|(text, named)| (parse_net(text).map(drop), text, named));
        let vsocks = vsocks.map(|(text, named)| (parse_vsock(text).map(drop), text, named));
        for (outcome, text, named) in nets.into_iter().chain(vsocks) {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains(named) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
