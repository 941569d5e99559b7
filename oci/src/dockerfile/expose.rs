//! Ports of `EXPOSE`.

use std::ops::RangeInclusive;

/// Most ports of one word, and of all.
pub(super) const MAX_PORTS: usize = 1024;

fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first)?, port(last)?);
    (first <= last && usize::from(last - first) < MAX_PORTS).then_some(first..=last)
}

/// Returns the ports of a word, `PORT[-PORT][/PROTOCOL]`, each with its protocol.
pub(super) fn ports(word: &str) -> Result<Vec<String>, String> {
    let (numbers, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    match range(numbers) {
        Some(range) if ["tcp", "udp", "sctp"].contains(&protocol.as_str()) => {
            Ok(range.map(|port| format!("{port}/{protocol}")).collect())
        }
        _ => Err(format!("{word:?}: PORT[-PORT][/tcp|/udp|/sctp] is wanted, with at most {MAX_PORTS} ports")),
    }
}
