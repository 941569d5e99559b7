//! Headers that pass between a client and a sandbox's port.

use axum::http::header::{
    CONNECTION, CONTENT_LENGTH, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Version};
use clade_agent_client::proto::TOKEN_HEADER;

use crate::error::{Answer, GatewayError};

pub(crate) const SANDBOX_ID: HeaderName = HeaderName::from_static("e2b-sandbox-id");
pub(crate) const SANDBOX_PORT: HeaderName = HeaderName::from_static("e2b-sandbox-port");
/// Shown in calls of the API alone.
pub(crate) const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Opens the ports of a sandbox that is not public.
pub(crate) const TRAFFIC_TOKEN: HeaderName = HeaderName::from_static("e2b-traffic-access-token");
/// Opens a sandbox's agent, and nothing else.
pub(crate) const AGENT_TOKEN: HeaderName = HeaderName::from_static(TOKEN_HEADER);
/// Marks a request to the agent as not the host's own. The agent has the same constant.
pub(crate) const PASSED_ON: HeaderName = HeaderName::from_static("x-clade-passed-on");
const WEBSOCKET: HeaderValue = HeaderValue::from_static("websocket");
/// Headers for one connection, or for this host alone.
const NOT_PASSED_ON: [HeaderName; 13] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-authenticate"),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("proxy-connection"),
    API_KEY,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    SANDBOX_ID,
    SANDBOX_PORT,
    TRAFFIC_TOKEN,
];

/// Drops the headers that are not forwarded, and those that `Connection` names.
pub(crate) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    // A length beside it has no meaning.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    for name in named.iter().chain(&NOT_PASSED_ON) {
        headers.remove(name);
    }
}

/// The same for a program in the guest, which must not learn the agent's token.
pub(crate) fn strip_for_program(headers: &mut HeaderMap) {
    strip(headers);
    headers.remove(AGENT_TOKEN);
}

/// Returns whether a header's list has `item`.
fn lists(headers: &HeaderMap, name: &HeaderName, item: &str) -> bool {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|one| one.trim().eq_ignore_ascii_case(item))
}

/// Refuses a request whose body ends in two places.
pub(crate) fn check_framing(headers: &HeaderMap) -> Answer<()> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let first = lengths.next();
    if lengths.any(|other| Some(other) != first) {
        return Err(GatewayError::bad("two values of Content-Length"));
    }
    if first.is_some() && headers.contains_key(TRANSFER_ENCODING) {
        return Err(GatewayError::bad("Content-Length beside Transfer-Encoding"));
    }
    Ok(())
}

/// Returns whether a request asks for a WebSocket. Offers of other protocols are ignored: the
/// request is answered in its own.
pub(crate) fn asks_for_websocket(head: &Parts) -> Answer<bool> {
    let headers = &head.headers;
    if !lists(headers, &CONNECTION, "upgrade") || !lists(headers, &UPGRADE, "websocket") {
        return Ok(false);
    }
    let bad = |why: &str| Err(GatewayError::bad(format!("a WebSocket is asked for {why}")));
    if head.version != Version::HTTP_11 || head.method != Method::GET {
        return bad("by something else than GET of HTTP/1.1");
    }
    let mut offered = headers.get_all(UPGRADE).iter();
    if !offered.next().is_some_and(|only| only.as_bytes().eq_ignore_ascii_case(b"websocket"))
        || offered.next().is_some()
    {
        return bad("beside another protocol");
    }
    let has_length = headers.get(CONTENT_LENGTH).is_some_and(|length| length != "0");
    if has_length || headers.contains_key(TRANSFER_ENCODING) {
        return bad("with a body");
    }
    if headers.get_all(SEC_WEBSOCKET_KEY).iter().count() != 1 {
        return bad("without one Sec-WebSocket-Key");
    }
    Ok(true)
}

/// Returns whether an answer accepts the offer.
pub(crate) fn takes_websocket(headers: &HeaderMap) -> bool {
    lists(headers, &UPGRADE, "websocket") && headers.get_all(SEC_WEBSOCKET_ACCEPT).iter().count() == 1
}

/// Adds the headers of a WebSocket that [`strip`] has dropped.
pub(crate) fn offer_websocket(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, WEBSOCKET);
}

#[cfg(test)]
mod tests {
    use axum::http::Request;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        map
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_is_the_hosts_or_the_connections_is_not_passed_on() {
        let all = headers(&[
            ("connection", "x-mine, close"),
            ("x-mine", "1"),
            ("x-api-key", "secret"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "3"),
            ("e2b-sandbox-id", "a"),
            ("e2b-sandbox-port", "1"),
            ("e2b-traffic-access-token", "secret"),
            ("upgrade", "h2c"),
            ("x-access-token", "the agent's"),
            ("authorization", "the program's"),
        ]);
        let mut for_agent = all.clone();
        strip(&mut for_agent);
        assert_eq!(names(&for_agent), ["authorization", "x-access-token"]);
        let mut for_program = all;
        strip_for_program(&mut for_program);
        assert_eq!(names(&for_program), ["authorization"]);
    }

    #[test]
    fn a_body_ends_in_one_place() {
        check_framing(&headers(&[("content-length", "3")])).unwrap();
        check_framing(&headers(&[("content-length", "3"), ("content-length", "3")])).unwrap();
        check_framing(&headers(&[("transfer-encoding", "chunked")])).unwrap();
        for wrong in [
            &[("content-length", "3"), ("content-length", "4")][..],
            &[("content-length", "3"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "identity"), ("content-length", "0")],
        ] {
            check_framing(&headers(wrong)).unwrap_err();
        }
    }

    #[test]
    fn a_websocket_is_asked_for_in_one_way() {
        let ask = |method: &str, version, more: &[(&'static str, &'static str)]| {
            let mut request = Request::builder().method(method).version(version).body(()).unwrap();
            *request.headers_mut() = headers(more);
            asks_for_websocket(&request.into_parts().0).map_err(|error| error.message)
        };
        let good = [("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket"), ("sec-websocket-key", "x")];
        assert_eq!(ask("GET", Version::HTTP_11, &good), Ok(true));
        // Not a request for one: without its half in Connection, or for another protocol.
        assert_eq!(ask("GET", Version::HTTP_11, &good[1..]), Ok(false));
        assert_eq!(ask("GET", Version::HTTP_11, &[good[0], good[2]]), Ok(false));
        assert_eq!(ask("POST", Version::HTTP_11, &[good[0], ("upgrade", "h2c")]), Ok(false));
        assert_eq!(ask("GET", Version::HTTP_11, &[("connection", "upgraded"), good[1], good[2]]), Ok(false));
        let with = |more: &[(&'static str, &'static str)]| ask("GET", Version::HTTP_11, &[&good[..], more].concat());
        for wrong in [
            ask("POST", Version::HTTP_11, &good),
            ask("GET", Version::HTTP_10, &good),
            ask("GET", Version::HTTP_11, &[good[0], ("upgrade", "websocket, h2c"), good[2]]),
            ask("GET", Version::HTTP_11, &good[..2]),
            with(&[("upgrade", "h2c")]),
            with(&[("upgrade", "websocket")]),
            with(&[("content-length", "5")]),
            with(&[("transfer-encoding", "chunked")]),
            with(&[("sec-websocket-key", "y")]),
        ] {
            wrong.unwrap_err();
        }
    }
}
