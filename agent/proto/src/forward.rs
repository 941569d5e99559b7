//! The lines at the beginning of a connection to a TCP port of a guest.
//!
//! The host sends `TCP 8080`, the agent answers `OK`, and the later bytes belong to the port. A
//! line with `CLOSED` means that the port has no listener, one with `ERR` that no connection was
//! tried.

/// The vsock port of such connections to the agent.
pub const FORWARD_PORT: u32 = 49984;
/// Maximum length of a request's line with its end; likewise of an answer's.
pub const MAX_REQUEST: usize = 16;
/// See [`MAX_REQUEST`].
pub const MAX_REPLY: usize = 128;

/// The line that requests a port.
#[must_use]
pub fn request(port: u16) -> String {
    format!("TCP {port}\n")
}

/// The port in a line without its end. Only the canonical form of a number is accepted.
#[must_use]
pub fn parse_request(line: &[u8]) -> Option<u16> {
    let digits = line.strip_prefix(b"TCP ")?;
    let is_number = digits.iter().all(u8::is_ascii_digit) && digits.first() != Some(&b'0');
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

/// The agent's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The port is connected.
    Open,
    /// The port cannot be connected to, for this reason.
    Closed(String),
    /// The agent does not try to connect, for this reason.
    Refused(String),
}

impl Reply {
    /// The line, cut to its maximum length.
    #[must_use]
    pub fn line(&self) -> String {
        let (word, why) = match self {
            Self::Open => return "OK\n".to_owned(),
            Self::Closed(why) => ("CLOSED", why),
            Self::Refused(why) => ("ERR", why),
        };
        let plain = why.chars().map(|c| if c == ' ' || c.is_ascii_graphic() { c } else { '?' });
        let text: String = plain.take(MAX_REPLY - word.len() - 2).collect();
        format!("{word} {text}\n")
    }

    /// Parses a line without its end. Returns `None` for an invalid answer.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let is_plain = line.iter().all(|byte| *byte == b' ' || byte.is_ascii_graphic());
        let text = std::str::from_utf8(line).ok().filter(|text| is_plain && text.len() < MAX_REPLY)?;
        match text.split_once(' ') {
            None if text == "OK" => Some(Self::Open),
            Some(("CLOSED", why)) => Some(Self::Closed(why.to_owned())),
            Some(("ERR", why)) => Some(Self::Refused(why.to_owned())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_port_and_nothing_else() {
        for port in [1, 80, 65535] {
            let line = request(port);
            assert!(line.len() <= MAX_REQUEST);
            assert_eq!(parse_request(line.trim_end_matches('\n').as_bytes()), Some(port));
        }
        for wrong in [
            "",
            "TCP",
            "TCP ",
            "TCP 0",
            "TCP 080",
            "TCP +80",
            "TCP 65536",
            "TCP 80 ",
            "TCP 80\r",
            "tcp 80",
            "UDP 80",
            "TCP 10.0.0.1:80",
            "TCP 80\0",
            "TCP -1",
            "TCP \u{663}",
        ] {
            assert_eq!(parse_request(wrong.as_bytes()), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_reply_is_one_line_of_bounded_length() {
        let long = "x".repeat(1000);
        for (reply, text) in [
            (Reply::Open, "OK\n".to_owned()),
            (Reply::Closed("no\nOK\r\u{e9}".to_owned()), "CLOSED no?OK??\n".to_owned()),
            (Reply::Refused(long), format!("ERR {}\n", "x".repeat(MAX_REPLY - 5))),
        ] {
            assert_eq!(reply.line(), text);
            assert!(reply.line().len() <= MAX_REPLY);
            let parsed = Reply::parse(text.trim_end_matches('\n').as_bytes()).unwrap();
            assert_eq!(parsed.line(), text);
        }
        for wrong in ["", "OK ", "OK 80", "ok", "CLOSED", "ERR", "HTTP/1.1 200 OK", "OK\r", "CLOSED \u{1b}[0m"] {
            assert_eq!(Reply::parse(wrong.as_bytes()), None, "{wrong:?}");
        }
    }
}
