//! Rules and headers by name, and against a naive model.

use std::net::IpAddr;

use proptest::prelude::*;

use super::frame::{DestinationPort, MAX_HEADERS, ParsedPacket, Protocol, parse};
use super::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;

/// A packet with an empty virtio header, to `to`, with `payload` after its IP header.
fn ip(to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0xff; 6]);
    frame.extend(MAC.0);
    let len = payload.len() as u16;
    match to {
        IpAddr::V4(to) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + len).to_be_bytes());
            frame.extend([0, 1, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 9]);
            frame.extend(to.octets());
        }
        IpAddr::V6(to) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(len.to_be_bytes());
            frame.extend([if protocol == ICMP { 58 } else { protocol }, 64]);
            frame.extend([0xfe; 16]);
            frame.extend(to.octets());
        }
    }
    frame.extend(payload);
    frame
}

fn transport(protocol: u8, port: u16) -> Vec<u8> {
    let mut header = vec![0x9c, 0x40];
    header.extend(port.to_be_bytes());
    match protocol {
        TCP => header.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 1, 0, 0, 0, 0, 0]),
        UDP => header.extend([0, 8, 0, 0]),
        _ => header = vec![8, 0, 0, 0, 0, 1, 0, 1],
    }
    header
}

fn packet(to: &str, protocol: u8, port: u16) -> Vec<u8> {
    ip(to.parse().unwrap(), protocol, &transport(protocol, port))
}

fn filter(rules: &[&str]) -> Filter {
    Filter::new(Egress::new(rules.iter().map(|rule| rule.parse().unwrap()).collect()).unwrap())
}

fn passes(filter: &Filter, packet: &[u8]) -> bool {
    let headers = &packet[..packet.len().min(MAX_HEADERS)];
    filter.judge(headers, packet.len(), MAC).passes
}

fn why(packet: &[u8]) -> &'static str {
    parse(&packet[..packet.len().min(MAX_HEADERS)], packet.len(), MAC).unwrap_err().0
}

#[test]
fn a_rule_is_its_text() {
    for rule in [
        "allow:10.0.0.0/8",
        "deny:10.1.2.3/32:25",
        "allow:0.0.0.0/0:1-65535/udp",
        "allow:2001:db8::/32",
        "allow:[2001:db8::/32]:443/tcp",
        "deny:::/0/icmp",
    ] {
        assert_eq!(rule.parse::<EgressRule>().unwrap().to_string(), rule);
    }
    assert_eq!("allow:[::1]:5".parse::<EgressRule>().unwrap().to_string(), "allow:[::1/128]:5");
    for (rule, wanted) in [
        ("10.0.0.0/8", "allow: or deny:"),
        ("permit:10.0.0.0/8", "allow: or deny:"),
        ("allow:", "an address"),
        ("allow:example.com", "an address"),
        ("allow:[::1]5", "an address"),
        ("allow:[::1:5", "an address"),
        ("allow:10.0.0.0/33", "a prefix"),
        ("allow:10.0.0.0/+8", "a prefix"),
        ("allow:10.0.0.0/", "a prefix"),
        ("allow:10.0.0.1/8", "no bit"),
        ("allow:::1/0", "no bit"),
        ("allow:10.0.0.0/8:", "a port"),
        ("allow:10.0.0.0/8:9-8", "a port"),
        ("allow:10.0.0.0/8:65536", "a port"),
        ("allow:10.0.0.0/8:1-", "a port"),
        ("allow:10.0.0.0/8:1/icmp", "no port"),
        ("allow:10.0.0.0/8/sctp", "a prefix"),
    ] {
        let error = rule.parse::<EgressRule>().unwrap_err().to_string();
        assert!(error.contains(rule) && error.contains(wanted), "{error}");
    }
    let many = vec!["allow:10.0.0.0/8".parse::<EgressRule>().unwrap(); MAX_RULES + 1];
    assert_eq!(Egress::new(many.clone()).unwrap_err(), EgressError::TooMany { rules: 257 });
    let full = Egress::new(many[1..].to_vec()).unwrap();
    assert_eq!(full.narrowed(&many[..1]).unwrap_err(), EgressError::TooMany { rules: 257 });
    let saved = serde_json::to_value(filter(&["allow:10.0.0.0/8"]).policy()).unwrap();
    assert_eq!(saved, serde_json::json!([["allow:10.0.0.0/8"]]));
    assert!(serde_json::from_value::<Egress>(serde_json::json!([["allow:10.0.0.1/8"]])).is_err());
}

#[test]
fn the_first_match_decides_and_a_layer_only_narrows() {
    let web = filter(&["deny:10.0.0.5", "allow:10.0.0.0/8:80-81/tcp", "allow:10.9.0.0/16", "allow:fd00::/8"]);
    for (to, protocol, port, passed) in [
        ("10.1.1.1", TCP, 80, true),
        ("10.1.1.1", TCP, 82, false),
        ("10.1.1.1", UDP, 80, false),
        ("10.0.0.5", TCP, 80, false),
        ("10.9.1.1", UDP, 53, true),
        ("10.9.1.1", ICMP, 0, true),
        ("10.1.1.1", ICMP, 0, false),
        ("11.1.1.1", TCP, 80, false),
        ("fd00::1", TCP, 22, true),
        ("fe00::1", TCP, 22, false),
    ] {
        assert_eq!(passes(&web, &packet(to, protocol, port)), passed, "{to} {protocol} {port}");
    }
    let not_mail = filter(&["deny:0.0.0.0/0:25/tcp"]);
    assert!(passes(&not_mail, &packet("1.1.1.1", TCP, 80)) && !passes(&not_mail, &packet("1.1.1.1", TCP, 25)));
    // A child with a rule that allows everything is still limited by its parent's rules.
    let narrow = |rules: &[&str]| {
        let rules: Vec<EgressRule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        Filter::new(web.policy().narrowed(&rules).unwrap())
    };
    let all = narrow(&["allow:0.0.0.0/0"]);
    assert!(passes(&all, &packet("10.1.1.1", TCP, 80)) && !passes(&all, &packet("11.1.1.1", TCP, 80)));
    assert!(!passes(&all, &packet("fd00::1", TCP, 22)));
    let mut less = narrow(&["deny:10.0.0.0/8:80"]);
    assert!(passes(&less, &packet("10.1.1.1", TCP, 81)));
    let dropped = packet("10.1.1.1", TCP, 80);
    let judgement = less.judge(&dropped, dropped.len(), MAC);
    less.count(&judgement);
    assert_eq!((judgement.passes, less.hits()), (false, &[vec![0, 1, 0, 0], vec![1]][..]));
    // Kept layers stay first, up to the number that exist.
    let mail = ["deny:0.0.0.0/0:25".parse().unwrap()];
    let two = less.policy().replaced(1, &mail).unwrap();
    assert_eq!(two.layers(), [&web.policy().layers()[0][..], &mail[..]]);
    assert_eq!(less.policy().replaced(9, &[]).unwrap(), *less.policy());
    assert_eq!(less.policy().replaced(0, &mail).unwrap().layers(), [&mail[..]]);
    assert!(less.policy().replaced(0, &[]).unwrap().is_empty());
    let many = vec![mail[0].clone(); MAX_RULES];
    assert_eq!(less.policy().replaced(1, &many).unwrap_err(), EgressError::TooMany { rules: 260 });
    // A repeated layer is added once, and an empty one not at all.
    assert_eq!(less.policy().narrowed(&["deny:10.0.0.0/8:80".parse().unwrap()]).unwrap(), *less.policy());
    assert_eq!(less.policy().narrowed(&[]).unwrap(), *less.policy());
}

#[test]
fn what_could_go_elsewhere_is_refused() {
    let good = packet("10.0.0.1", TCP, 80);
    let change = |at: usize, bytes: &[u8]| {
        let mut packet = good.clone();
        packet[at..at + bytes.len()].copy_from_slice(bytes);
        why(&packet)
    };
    assert_eq!(change(18, &[2, 0, 0, 0, 0, 2]), "another's Ethernet address");
    assert_eq!(change(24, &[0x88, 0xcc]), "neither IP nor ARP");
    assert_eq!(change(26, &[0x44]), "no IPv4 header");
    assert_eq!(change(28, &[0, 10]), "the length of its IPv4 header");
    assert_eq!(change(28, &[4, 0]), "the length of its IPv4 header");
    assert_eq!(change(35, &[47]), "neither TCP nor UDP nor ICMP");
    assert_eq!(change(58, &[0xf0]), "no whole TCP header");
    // A part of a TCP header, and an overlapping fragment.
    assert_eq!(change(32, &[0, 1]), "a fragment of a TCP header");
    assert_eq!(change(32, &[0x1f, 0xff]), "a fragment beyond the largest packet");
    let tiny = ip("10.0.0.1".parse().unwrap(), TCP, &transport(TCP, 80)[..8]);
    assert_eq!(why(&tiny), "no whole TCP header");
    // The host's checksum would overwrite the port or the address.
    assert_eq!(change(0, &[1, 0, 0, 0, 0, 0, 34, 0, 2, 0]), "its checksum is to be written elsewhere");
    assert_eq!(change(0, &[1, 0, 0, 0, 0, 0, 14, 0, 16, 0]), "its checksum is to be written elsewhere");
    assert_eq!(change(0, &[8]), "unknown flags of its virtio header");
    assert_eq!(change(0, &[1, 4, 0, 0, 0, 0, 34, 0, 16, 0]), "segments of another protocol");
    assert_eq!(change(0, &[0, 1]), "segments without a checksum");
    let mut right = good.clone();
    right[..10].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    assert!(parse(&right, right.len(), MAC).is_ok());
    // A source route, and router alert.
    let routed = |option: [u8; 4]| {
        let mut packet = good.clone();
        (packet[26], packet[29]) = (0x46, 44);
        packet.splice(46..46, option);
        parse(&packet, packet.len(), MAC).map_err(|refused| refused.0)
    };
    assert_eq!(routed([131, 3, 4, 0]), Err("an option of IPv4"));
    assert_eq!(routed([148, 5, 0, 0]), Err("an option of IPv4"));
    assert!(routed([148, 4, 0, 0]).is_ok());
    for len in 0..good.len() {
        assert!(parse(&good[..len], len, MAC).is_err(), "cut at {len}");
    }
}

#[test]
fn later_fragments_pass_where_all_ports_may() {
    let fragment = |to: &str, protocol| {
        let mut packet = ip(to.parse().unwrap(), protocol, &[0; 64]);
        packet[32..34].copy_from_slice(&[0, 100]);
        packet
    };
    let udp = fragment("10.0.0.1", UDP);
    for (rules, passed) in [
        (&["allow:10.0.0.0/8"][..], true),
        (&["allow:10.0.0.0/8:53"], false),
        (&["allow:10.0.0.0/8:53", "allow:10.0.0.0/8/udp"], true),
        (&["deny:10.0.0.0/8:53", "allow:10.0.0.0/8"], false),
        (&["deny:10.0.0.0/8:53/tcp", "allow:10.0.0.0/8"], true),
        (&["allow:10.0.0.0/8:0-65535"], true),
    ] {
        assert_eq!(passes(&filter(rules), &udp), passed, "{rules:?}");
    }
    // Over IPv6, after options.
    let mut payload = vec![44, 0, 1, 4, 0, 0, 0, 0, UDP, 0, 3, 0x20, 0, 0, 0, 1];
    payload.extend([0; 40]);
    let v6 = ip("fd00::1".parse().unwrap(), 60, &payload);
    let Ok(ParsedPacket::Ip(found)) = parse(&v6, v6.len(), MAC) else { panic!("{}", why(&v6)) };
    assert_eq!((found.port, found.protocol), (DestinationPort::Any, Protocol::Udp));
}

#[test]
fn ipv6_headers_are_bounded_and_neighbours_are_found() {
    let to: IpAddr = "fd00::1".parse().unwrap();
    let options = |count: usize| {
        let mut payload = Vec::new();
        for left in (0..count).rev() {
            payload.extend([if left == 0 { TCP } else { 60 }, 15]);
            payload.extend([0; 126]);
        }
        payload.extend(transport(TCP, 443));
        ip(to, 60, &payload)
    };
    let two = options(2);
    assert!(parse(&two[..MAX_HEADERS.min(two.len())], two.len(), MAC).is_ok());
    assert_eq!(why(&options(3)), "many extension headers");
    for next in [43, 51, 50, 59, 41, 135] {
        assert_eq!(why(&ip(to, next, &transport(TCP, 443))), "neither TCP nor UDP nor ICMPv6", "{next}");
    }
    // A fragment header must be the last extension header.
    assert_eq!(why(&ip(to, 44, &[60, 0, 0, 1, 0, 0, 0, 1])), "neither TCP nor UDP nor ICMPv6");
    let none = filter(&["deny:::/0", "deny:0.0.0.0/0"]);
    for (to, is_of_link) in [
        ("fe80::1", true),
        ("febf::1", true),
        ("ff02::1:ff00:1", true),
        ("ff12::1", true),
        ("fec0::1", false),
        ("ff05::2", false),
        ("ff0e::1", false),
        ("fd00::1", false),
        ("2001:db8::1", false),
    ] {
        let mut neighbours = ip(to.parse().unwrap(), ICMP, &[135, 0, 0, 0, 0, 0, 0, 0]);
        assert!(!passes(&none, &neighbours), "{to}: not of a neighbour");
        neighbours[33] = 255;
        assert_eq!(passes(&none, &neighbours), is_of_link, "{to}");
        assert!(passes(&filter(&[&format!("allow:{to}/128")]), &neighbours), "{to}");
    }
    let mut arp = vec![0; 12];
    arp.extend([0xff; 6]);
    arp.extend(MAC.0);
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(MAC.0);
    arp.extend([0; 14]);
    assert!(passes(&none, &arp));
    arp[34..40].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    assert_eq!(why(&arp), "not the guest's own ARP");
    let mut tagged = packet("10.0.0.1", TCP, 80);
    tagged.splice(24..24, [0x81, 0, 0, 7]);
    assert!(passes(&filter(&["allow:10.0.0.1:80"]), &tagged) && !passes(&none, &tagged));
    tagged.splice(24..24, [0x81, 0, 0, 7]);
    assert_eq!(why(&tagged), "neither IP nor ARP");
}

/// A rule as numbers.
type Naive = (bool, IpAddr, u8, Option<(u16, u16)>, Option<u8>);

fn address() -> impl Strategy<Value = IpAddr> {
    // Few differing bits, so that rules match packets.
    (any::<bool>(), any::<[bool; 4]>()).prop_map(|(six, bits)| {
        let [a, b, c, d] = bits.map(u8::from);
        if six {
            IpAddr::from([0xfd, a << 7, 0, 0, 0, 0, 0, b, 0, 0, 0, 0, 0, c << 4, 0, d])
        } else {
            IpAddr::from([a << 7, b, c << 4, d])
        }
    })
}

fn bits(address: IpAddr) -> Vec<u8> {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    octets.iter().flat_map(|octet| (0..8).rev().map(move |bit| octet >> bit & 1)).collect()
}

fn rule() -> impl Strategy<Value = Naive> {
    let ports = prop::option::of((0u16..6, 0u16..6).prop_map(|(a, b)| (a.min(b), a.max(b))));
    let protocol = prop::option::of(prop::sample::select(vec![TCP, UDP]));
    (any::<bool>(), address(), any::<u8>(), ports, protocol).prop_map(|(allow, address, prefix, ports, protocol)| {
        let most = if address.is_ipv4() { 32 } else { 128 };
        (allow, address, prefix % (most + 1), ports, protocol)
    })
}

fn text((allow, address, prefix, ports, protocol): &Naive) -> String {
    let mut kept = bits(*address);
    kept[usize::from(*prefix)..].fill(0);
    let octets: Vec<u8> = kept.chunks(8).map(|bits| bits.iter().fold(0, |all, bit| all << 1 | bit)).collect();
    let address = match *octets {
        [a, b, c, d] => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(<[u8; 16]>::try_from(octets).unwrap()),
    };
    let ports = ports.map_or(String::new(), |(first, last)| format!(":{first}-{last}"));
    let protocol = match protocol {
        Some(TCP) => "/tcp",
        Some(_) => "/udp",
        None => "",
    };
    format!("{}:[{address}/{prefix}]{ports}{protocol}", if *allow { "allow" } else { "deny" })
}

fn naive(layers: &[Vec<Naive>], to: IpAddr, protocol: u8, port: u16) -> bool {
    layers.iter().filter(|layer| !layer.is_empty()).all(|layer| {
        for (allow, address, prefix, ports, only) in layer {
            let len = usize::from(*prefix);
            let same = address.is_ipv4() == to.is_ipv4() && bits(*address)[..len] == bits(to)[..len];
            let port = ports.is_none_or(|(first, last)| protocol != ICMP && (first..=last).contains(&port));
            if same && port && only.is_none_or(|only| only == protocol) {
                return *allow;
            }
        }
        layer.iter().all(|(allow, ..)| !allow)
    })
}

proptest! {
    #[test]
    fn rules_are_as_a_naive_model_has_them(
        layers in prop::collection::vec(prop::collection::vec(rule(), 0..5), 0..3),
        to in address(),
        protocol in prop::sample::select(vec![TCP, UDP, ICMP]),
        port in 0u16..6,
        flips in prop::collection::vec((0usize..80, any::<u8>()), 0..3),
    ) {
        let rules = |layer: &Vec<Naive>| layer.iter().map(|rule| text(rule).parse().unwrap()).collect();
        let policy: Egress = layers.iter().map(rules).collect::<Vec<Vec<EgressRule>>>().try_into().unwrap();
        let filter = Filter::new(policy);
        let mut packet = ip(to, protocol, &transport(protocol, port));
        prop_assert_eq!(passes(&filter, &packet), naive(&layers, to, protocol, port));
        // For any bytes: the result matches them, and the parser does not panic.
        for (at, byte) in flips {
            let at = at % packet.len();
            packet[at] = byte;
        }
        if let Ok(ParsedPacket::Ip(found)) = parse(&packet, packet.len(), MAC) {
            let tag = if packet[24..26] == [0x81, 0] { 4 } else { 0 };
            let at = 26 + tag;
            let there: IpAddr = if packet[at] >> 4 == 4 {
                <[u8; 4]>::try_from(&packet[at + 16..at + 20]).unwrap().into()
            } else {
                <[u8; 16]>::try_from(&packet[at + 24..at + 40]).unwrap().into()
            };
            prop_assert_eq!(found.to, there);
            prop_assert_eq!(&packet[18..24], &MAC.0);
        }
    }
}
