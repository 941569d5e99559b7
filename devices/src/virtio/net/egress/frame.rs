//! The destination of a packet: its Ethernet, IP and transport headers.
//!
//! A packet that could reach another place than its headers name is refused: source routes, a
//! checksum that the host is to write somewhere else, headers that do not fit into the first
//! fragment. A fragment cannot move a port afterwards: ports are in the first 8 bytes of the first
//! fragment, and no later one begins before them.

use std::net::{IpAddr, Ipv6Addr};

use clade_host_io::VNET_HEADER;
use etherparse::{
    EtherType, Ethernet2HeaderSlice, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice,
    Ipv6RawExtHeaderSlice, SingleVlanHeaderSlice, TcpHeaderSlice, UdpHeaderSlice,
};
use thiserror::Error;

use crate::virtio::net::mac::Mac;

/// Maximum length of IPv6 extension headers.
const MAX_EXTENSIONS: usize = 256;
/// Bytes at the beginning of a packet that contain all headers that can be parsed.
pub(in super::super) const MAX_HEADERS: usize = 512;

/// The protocol above IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Tcp,
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// The port of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DestinationPort {
    One(u16),
    /// The port is in another fragment.
    Any,
    /// The protocol has no ports.
    None,
}

/// The destination of an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IpPacket {
    pub(super) to: IpAddr,
    pub(super) protocol: Protocol,
    pub(super) port: DestinationPort,
}

/// A packet that was parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ParsedPacket {
    /// ARP, or neighbour discovery at addresses of the link: these find Ethernet addresses, and routers do not forward
    /// them.
    Neighbours,
    Ip(IpPacket),
}

/// Whether no router forwards packets to the address: fe80::/10, and multicast of the link.
fn is_of_link(to: &Ipv6Addr) -> bool {
    to.is_unicast_link_local() || to.octets()[0] == 0xff && to.octets()[1] & 0xf == 2
}

/// Why a packet is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub(super) struct PacketError(pub(super) &'static str);

type Parsed<T> = Result<T, PacketError>;

/// Offload request of the driver to the interface: `struct virtio_net_hdr`.
#[derive(Clone, Copy)]
struct VnetHeader {
    checksum: Option<(usize, usize)>,
    segments: u8,
}

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

impl VnetHeader {
    fn parse(header: &[u8]) -> Parsed<Self> {
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let checksum = match header[0] {
            0 => None,
            NEEDS_CSUM => Some((word(6), word(8))),
            _ => return Err(PacketError("unknown flags of its virtio header")),
        };
        let segments = header[1] & !GSO_ECN;
        if header[1] == GSO_ECN || (segments != GSO_NONE && checksum.is_none()) {
            return Err(PacketError("segments without a checksum"));
        }
        Ok(Self { checksum, segments })
    }

    /// Refuses to write a checksum anywhere but into the checksum field of the transport header at
    /// `at`.
    fn check(self, at: usize, protocol: Option<Protocol>, tcp: u8) -> Parsed<()> {
        let place = match protocol {
            Some(Protocol::Tcp) => Some((at, 16)),
            Some(Protocol::Udp) => Some((at, 6)),
            Some(Protocol::Icmp) | None => None,
        };
        if self.checksum.is_some() && self.checksum != place {
            return Err(PacketError("its checksum is to be written elsewhere"));
        }
        let segments = if protocol == Some(Protocol::Tcp) { tcp } else { GSO_NONE };
        if self.segments != GSO_NONE && self.segments != segments {
            return Err(PacketError("segments of another protocol"));
        }
        Ok(())
    }
}

/// Parses a packet of `len` bytes that begins with `headers`.
pub(super) fn parse(headers: &[u8], len: usize, mac: Mac) -> Parsed<ParsedPacket> {
    if headers.len() < VNET_HEADER || len < headers.len() {
        return Err(PacketError("no virtio header"));
    }
    let (virtio, frame) = headers.split_at(VNET_HEADER);
    let offload = VnetHeader::parse(virtio)?;
    let ethernet = Ethernet2HeaderSlice::from_slice(frame).map_err(|_| PacketError("no Ethernet header"))?;
    if ethernet.source() != mac.0 {
        return Err(PacketError("another's Ethernet address"));
    }
    let mut at = 14;
    let mut kind = ethernet.ether_type();
    if kind == EtherType::VLAN_TAGGED_FRAME {
        let tag = SingleVlanHeaderSlice::from_slice(&frame[at..]).map_err(|_| PacketError("no VLAN tag"))?;
        kind = tag.ether_type();
        at += 4;
    }
    let frame = FrameCursor { bytes: frame, len: len - VNET_HEADER, at, offload };
    match kind {
        EtherType::ARP => frame.arp(mac),
        EtherType::IPV4 => frame.ipv4(),
        EtherType::IPV6 => frame.ipv6(),
        _ => Err(PacketError("neither IP nor ARP")),
    }
}

/// A frame and the place of its next header.
struct FrameCursor<'a> {
    bytes: &'a [u8],
    len: usize,
    at: usize,
    offload: VnetHeader,
}

impl FrameCursor<'_> {
    fn rest(&self) -> Parsed<&[u8]> {
        self.bytes.get(self.at..).ok_or(PacketError("its headers are too long"))
    }

    /// An ARP request or answer for IPv4 over Ethernet, with the guest's own address as the sender.
    fn arp(&self, mac: Mac) -> Parsed<ParsedPacket> {
        let arp = self.rest()?;
        self.offload.check(0, None, GSO_NONE)?;
        let own = arp.len() >= 28 && arp[..6] == [0, 1, 8, 0, 6, 4] && arp[8..14] == mac.0;
        if own && arp[6] == 0 && matches!(arp[7], 1 | 2) {
            Ok(ParsedPacket::Neighbours)
        } else {
            Err(PacketError("not the guest's own ARP"))
        }
    }

    fn ipv4(mut self) -> Parsed<ParsedPacket> {
        let ip = Ipv4HeaderSlice::from_slice(self.rest()?).map_err(|_| PacketError("no IPv4 header"))?;
        let (header, total) = (ip.slice().len(), usize::from(ip.total_len()));
        if total < header || total > self.len - self.at {
            return Err(PacketError("the length of its IPv4 header"));
        }
        // End, no-op, and router alert. A source route would change the destination.
        let mut options = ip.options();
        while let Some((kind, rest)) = options.split_first() {
            options = match kind {
                0 => &[],
                1 => rest,
                148 if rest.len() >= 3 && rest[0] == 4 => &rest[3..],
                _ => return Err(PacketError("an option of IPv4")),
            };
        }
        let to = IpAddr::V4(ip.destination_addr());
        let protocol = match ip.protocol() {
            IpNumber::TCP => Protocol::Tcp,
            IpNumber::UDP => Protocol::Udp,
            IpNumber::ICMP => Protocol::Icmp,
            _ => return Err(PacketError("neither TCP nor UDP nor ICMP")),
        };
        let offset = usize::from(ip.fragments_offset().value());
        let fragment = ip.more_fragments() || offset != 0;
        self.at += header;
        let port = self.transport(protocol, total - header, offset, fragment, GSO_TCPV4)?;
        Ok(ParsedPacket::Ip(IpPacket { to, protocol, port }))
    }

    fn ipv6(mut self) -> Parsed<ParsedPacket> {
        let ip = Ipv6HeaderSlice::from_slice(self.rest()?).map_err(|_| PacketError("no IPv6 header"))?;
        let mut left = usize::from(ip.payload_length());
        let (to, hops, mut next) = (ip.destination_addr(), ip.hop_limit(), ip.next_header());
        self.at += 40;
        if left > self.len - self.at {
            return Err(PacketError("the length of its IPv6 header"));
        }
        let first = self.at;
        while matches!(next, IpNumber::IPV6_HEADER_HOP_BY_HOP | IpNumber::IPV6_DESTINATION_OPTIONS) {
            let extension = Ipv6RawExtHeaderSlice::from_slice(self.rest()?);
            let extension = extension.map_err(|_| PacketError("no extension header"))?;
            next = extension.next_header();
            let len = extension.slice().len();
            left = left.checked_sub(len).ok_or(PacketError("a long extension header"))?;
            self.at += len;
            if self.at - first > MAX_EXTENSIONS {
                return Err(PacketError("many extension headers"));
            }
        }
        let (mut offset, mut fragment) = (0, false);
        if next == IpNumber::IPV6_FRAGMENTATION_HEADER {
            let header = Ipv6FragmentHeaderSlice::from_slice(self.rest()?);
            let header = header.map_err(|_| PacketError("no fragment header"))?;
            next = header.next_header();
            offset = usize::from(header.fragment_offset().value());
            fragment = header.more_fragments() || offset != 0;
            left = left.checked_sub(8).ok_or(PacketError("a long fragment header"))?;
            self.at += 8;
        }
        let protocol = match next {
            IpNumber::TCP => Protocol::Tcp,
            IpNumber::UDP => Protocol::Udp,
            IpNumber::IPV6_ICMP => Protocol::Icmp,
            _ => return Err(PacketError("neither TCP nor UDP nor ICMPv6")),
        };
        let plain = self.at == first && protocol == Protocol::Icmp && left >= 8;
        let kind = self.rest()?.first().copied();
        // Router and neighbour solicitations, and neighbour advertisements. No receiver accepts one with a lower hop
        // limit. Routers do forward one, so only the addresses of the link are excepted from rules.
        if plain && hops == 255 && is_of_link(&to) && matches!(kind, Some(133 | 135 | 136)) {
            self.offload.check(0, None, GSO_NONE)?;
            return Ok(ParsedPacket::Neighbours);
        }
        let port = self.transport(protocol, left, offset, fragment, GSO_TCPV6)?;
        Ok(ParsedPacket::Ip(IpPacket { to: IpAddr::V6(to), protocol, port }))
    }

    /// The port in a transport header. The packet has `len` bytes from `offset` on, in units of 8.
    fn transport(
        &self,
        protocol: Protocol,
        len: usize,
        offset: usize,
        fragment: bool,
        tcp: u8,
    ) -> Parsed<DestinationPort> {
        let checked = (!fragment).then_some(protocol);
        self.offload.check(self.at, checked, tcp)?;
        if offset * 8 + len > usize::from(u16::MAX) {
            return Err(PacketError("a fragment beyond the largest packet"));
        }
        if protocol == Protocol::Icmp {
            return if offset != 0 || len >= 8 {
                Ok(DestinationPort::None)
            } else {
                Err(PacketError("no ICMP header"))
            };
        }
        if offset != 0 {
            // The fragment could be taken for a part of the TCP header.
            let tiny = protocol == Protocol::Tcp && offset * 8 < 60;
            return if tiny { Err(PacketError("a fragment of a TCP header")) } else { Ok(DestinationPort::Any) };
        }
        let rest = self.rest()?;
        let rest = &rest[..rest.len().min(len)];
        if protocol == Protocol::Tcp {
            let header = TcpHeaderSlice::from_slice(rest).map_err(|_| PacketError("no whole TCP header"))?;
            return Ok(DestinationPort::One(header.destination_port()));
        }
        let header = UdpHeaderSlice::from_slice(rest).map_err(|_| PacketError("no whole UDP header"))?;
        let says = usize::from(header.length());
        if says < 8 || (!fragment && says > len) {
            return Err(PacketError("the length of its UDP header"));
        }
        Ok(DestinationPort::One(header.destination_port()))
    }
}
