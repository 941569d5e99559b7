//! The network in the kernel's command line, if the kernel has not set it up itself.
//!
//! The word is the kernel's own:
//! `ip=CLIENT:SERVER:GATEWAY:NETMASK:HOSTNAME:DEVICE:AUTOCONF:RESOLVER:RESOLVER`. Only addresses
//! given there are set, without queries to the network.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use crate::log::log;

/// The default device.
const DEVICE: &str = "eth0";
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The guest's addresses on its network.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    client: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    device: String,
    resolvers: Vec<Ipv4Addr>,
}

impl Address {
    /// Parses `ip=`. None without that word, or if it requests autoconfiguration.
    fn of(words: &[String]) -> Option<Self> {
        let word = words.iter().find_map(|word| word.strip_prefix("ip="))?;
        let fields: Vec<&str> = word.split(':').collect();
        let field = |at: usize| fields.get(at).copied().filter(|field| !field.is_empty());
        let address = |at: usize| field(at)?.parse::<Ipv4Addr>().ok().filter(|address| !address.is_unspecified());
        let device = field(5).unwrap_or(DEVICE);
        let is_name = device.len() < 16 && device.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if !is_name || !matches!(field(6), None | Some("off" | "none")) {
            return None;
        }
        // The default of the kernel: the mask of an old address class.
        let mask = address(3).unwrap_or(Ipv4Addr::new(255, 255, 255, 0)).to_bits();
        Some(Self {
            client: address(0)?,
            prefix: mask.leading_ones() as u8,
            gateway: address(2),
            device: device.to_owned(),
            resolvers: [7, 8].into_iter().filter_map(address).collect(),
        })
    }
}

/// A message of rtnetlink's.
struct Message(Vec<u8>);

impl Message {
    const NEWLINK: u16 = 16;
    const NEWADDR: u16 = 20;
    const NEWROUTE: u16 = 24;
    /// The kernel acknowledges the request.
    const REQUEST: u16 = 0x001 | 0x004;
    /// A new object is made.
    const MAKE: u16 = 0x200 | 0x400;
    const HEADER: usize = 16;
    const INET: u8 = 2;

    fn new(kind: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; Self::HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        let make = if kind == Self::NEWLINK { 0 } else { Self::MAKE };
        bytes[6..8].copy_from_slice(&(Self::REQUEST | make).to_ne_bytes());
        bytes.extend(body);
        Self(bytes)
    }

    fn up(device: u32) -> Self {
        const IFF_UP: u32 = 1;
        let words = [0, device, IFF_UP, IFF_UP];
        Self::new(Self::NEWLINK, &words.map(u32::to_ne_bytes).concat())
    }

    fn address(device: u32, address: Ipv4Addr, prefix: u8) -> Self {
        const IFA_ADDRESS: u16 = 1;
        const IFA_LOCAL: u16 = 2;
        let body = [&[Self::INET, prefix, 0, 0][..], &device.to_ne_bytes()].concat();
        Self::new(Self::NEWADDR, &body).with(IFA_LOCAL, address.octets()).with(IFA_ADDRESS, address.octets())
    }

    fn default_route(device: u32, gateway: Ipv4Addr) -> Self {
        const RTA_OIF: u16 = 4;
        const RTA_GATEWAY: u16 = 5;
        /// Main table, protocol boot, universe scope, unicast.
        const ROUTE: [u8; 12] = [Message::INET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        Self::new(Self::NEWROUTE, &ROUTE).with(RTA_GATEWAY, gateway.octets()).with(RTA_OIF, device.to_ne_bytes())
    }

    fn with(mut self, kind: u16, value: [u8; 4]) -> Self {
        self.0.extend(8u16.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self
    }

    /// Sends the request to the kernel. An existing object is not an error.
    fn send(mut self) -> io::Result<()> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        // The protocol 0 is routing. Without an address the message goes to the kernel.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        send(&socket, &self.0, SendFlags::empty())?;
        let mut answer = [0; 1024];
        let (got, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
        let code = answer[..got].get(Self::HEADER..).and_then(|rest| rest.first_chunk());
        match code.map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => Ok(()),
            Some(code) if -code == rustix::io::Errno::EXIST.raw_os_error() => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Sets up the network of the kernel's command line. The name servers of an image are those of the host that
/// made it.
pub(crate) fn set_up(words: &[String], is_image: bool) {
    let Some(address) = Address::of(words) else { return };
    if let Err(error) = connect(&address) {
        log!("network {}: {error}", address.device);
    }
    if !address.resolvers.is_empty()
        && let Err(error) = name_resolvers(Path::new(RESOLV_CONF), &address.resolvers, is_image)
    {
        log!("{RESOLV_CONF}: {error}");
    }
}

fn connect(address: &Address) -> io::Result<()> {
    let index = fs::read_to_string(format!("/sys/class/net/{}/ifindex", address.device))?;
    let device: u32 = index.trim().parse().map_err(io::Error::other)?;
    Message::address(device, address.client, address.prefix).send()?;
    Message::up(device).send()?;
    address.gateway.map_or(Ok(()), |gateway| Message::default_route(device, gateway).send())
}

/// Adds name servers to a file without any, or replaces them.
fn name_resolvers(file: &Path, resolvers: &[Ipv4Addr], is_replaced: bool) -> io::Result<()> {
    let there = fs::read_to_string(file).unwrap_or_default();
    if !is_replaced && there.lines().any(|line| line.trim_start().starts_with("nameserver")) {
        return Ok(());
    }
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    let lines: String = resolvers.iter().map(|resolver| format!("nameserver {resolver}\n")).collect();
    fs::write(file, &lines).or_else(|_| {
        // A link to a file that another init would make.
        fs::remove_file(file)?;
        fs::write(file, &lines)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Option<Address> {
        Address::of(&line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_command_line_says_what_the_guest_is() {
        let all = of("quiet ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off:10.0.2.3 x").unwrap();
        let expected = Address {
            client: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 0, 2, 2)),
            device: "eth0".to_owned(),
            resolvers: vec![Ipv4Addr::new(10, 0, 2, 3)],
        };
        assert_eq!(all, expected);
        let short = of("ip=192.0.2.7").unwrap();
        assert_eq!((short.prefix, short.gateway, short.device.as_str()), (24, None, "eth0"));
        assert_eq!(of("ip=192.0.2.7:::255.255.0.0:web:eth1:none:1.1.1.1:8.8.8.8").unwrap().resolvers.len(), 2);
        for none in
            ["", "ip=dhcp", "ip=:::::eth0:dhcp", "ip=10.0.2.15:::::eth0:dhcp", "ip=10.0.2.15:::::../x", "ip=0.0.0.0"]
        {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn messages_have_the_kernels_form() {
        let Message(bytes) = Message::address(3, Ipv4Addr::new(10, 0, 2, 15), 24);
        assert_eq!(bytes.len(), 16 + 8 + 8 + 8);
        assert_eq!(bytes[16..24], [2, 24, 0, 0, 3, 0, 0, 0]);
        assert_eq!(bytes[24..32], [8, 0, 2, 0, 10, 0, 2, 15]);
        assert_eq!(Message::up(3).0.len(), 16 + 16);
        assert_eq!(Message::default_route(3, Ipv4Addr::new(10, 0, 2, 2)).0.len(), 16 + 12 + 8 + 8);
        // The kernel handles the request, and finds no such device.
        let refused = Message::up(u32::MAX >> 1).send().unwrap_err();
        let codes = [rustix::io::Errno::NODEV, rustix::io::Errno::PERM].map(|code| Some(code.raw_os_error()));
        assert!(codes.contains(&refused.raw_os_error()), "{refused}");
    }

    /// In a network namespace of its own, which may need root.
    #[test]
    fn a_guest_has_its_address_and_a_way_out() {
        let in_own = std::thread::spawn(|| {
            // SAFETY: it changes the network of this thread alone, and no memory.
            if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.is_err() {
                clade_test_support::skipped("no network of its own");
                return;
            }
            let there = of("ip=10.9.8.7::10.9.8.1:255.255.255.0::lo:off").unwrap();
            // Repeated, as after a kernel that has done it.
            (0..2).for_each(|_| connect(&there).unwrap());
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect("192.0.2.1:9").unwrap();
            assert_eq!(socket.local_addr().unwrap().ip().to_string(), "10.9.8.7");
            connect(&Address { device: "none".to_owned(), ..there }).unwrap_err();
        });
        in_own.join().unwrap();
    }

    #[test]
    fn resolvers_are_named_where_none_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        let resolvers = [Ipv4Addr::new(10, 0, 2, 3)];
        std::os::unix::fs::symlink(dir.path().join("no/such"), &file).unwrap();
        name_resolvers(&file, &resolvers, false).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 10.0.2.3\n");
        fs::write(&file, "# mine\nnameserver 192.0.2.1\n").unwrap();
        name_resolvers(&file, &resolvers, false).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "# mine\nnameserver 192.0.2.1\n");
        // An image's are replaced, and it may have no directory for them.
        for file in [file, dir.path().join("etc/resolv.conf")] {
            name_resolvers(&file, &resolvers, true).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), "nameserver 10.0.2.3\n");
        }
    }
}
