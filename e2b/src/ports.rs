//! The sandbox and port that a request is for.

use axum::http::header::HOST;
use axum::http::{HeaderMap, HeaderName};
use clade_agent_client::proto::PORT;

use crate::error::{Answer, GatewayError};
use crate::headers::{API_KEY, SANDBOX_ID, SANDBOX_PORT};

/// The port of a sandbox that a request is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) id: String,
    pub(crate) port: u16,
}

fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Answer<Option<&'a str>> {
    let mut all = headers.get_all(name).iter();
    let Some(first) = all.next() else { return Ok(None) };
    let text = first.to_str().ok().filter(|_| all.next().is_none());
    text.map(Some).ok_or_else(|| GatewayError::bad(format!("{name} is there twice, or is no text")))
}

/// Parses `PORT-ID`, as a label in front of a domain.
fn labelled(label: &str) -> Option<Target> {
    let (port, id) = label.split_once('-')?;
    let is_name = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric());
    is_name.then_some(())?;
    Some(Target { id: id.to_owned(), port: number(port)? })
}

fn without_port(name: &str) -> &str {
    name.split_once(':').map_or(name, |(name, _)| name).trim_end_matches('.')
}

/// Parses a port in its one canonical form.
pub(crate) fn number(text: &str) -> Option<u16> {
    let is_number = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    is_number.then(|| text.parse().ok()).flatten()
}

impl Target {
    /// Returns the target of a request, or None for a call of the API. The headers and the host
    /// must not name two targets. A call has an API key, and in some calls older SDKs also name the
    /// sandbox.
    pub(crate) fn of(headers: &HeaderMap, domain: Option<&str>) -> Answer<Option<Self>> {
        let host = one(headers, &HOST)?.unwrap_or_default().to_ascii_lowercase();
        // Also the domain may have a port: that of clients' addresses, which a proxy may have changed.
        let [host, domain] = [Some(host.as_str()), domain].map(|name| name.map(without_port));
        let host = host.unwrap_or_default();
        let by_host = domain
            .and_then(|domain| host.strip_suffix(domain)?.strip_suffix('.'))
            .map(|label| labelled(label).ok_or_else(|| GatewayError::bad(format!("{host:?} names no sandbox's port"))));
        // The API itself is below the domain, too.
        let is_api = domain.is_some_and(|domain| host.strip_suffix(domain) == Some("api."));
        let by_host = by_host.filter(|_| !is_api).transpose()?;
        if headers.contains_key(API_KEY) {
            return Ok(by_host);
        }
        let port = match one(headers, &SANDBOX_PORT)? {
            Some(port) => Some(number(port).ok_or_else(|| GatewayError::bad(format!("E2b-Sandbox-Port={port:?}")))?),
            None => None,
        };
        let Some(id) = one(headers, &SANDBOX_ID)? else {
            return match port {
                Some(_) if by_host.is_none() => Err(GatewayError::bad("E2b-Sandbox-Port without E2b-Sandbox-Id")),
                Some(port) if by_host.as_ref().is_some_and(|target| target.port != port) => {
                    Err(GatewayError::bad("E2b-Sandbox-Port is not the host's"))
                }
                _ => Ok(by_host),
            };
        };
        let target = Self { id: id.to_ascii_lowercase(), port: port.unwrap_or(PORT as u16) };
        match by_host {
            // The port is in the host's name unless a header has it.
            Some(other) if other.id != target.id || port.is_some_and(|port| port != other.port) => {
                Err(GatewayError::bad("E2b-Sandbox-Id and E2b-Sandbox-Port are not the host's"))
            }
            Some(other) => Ok(Some(other)),
            None => Ok(Some(target)),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderValue, StatusCode};

    use super::*;

    fn target(headers: &[(&str, &str)]) -> Answer<Option<Target>> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        Target::of(&map, Some("box.test"))
    }

    fn is(id: &str, port: u16) -> Answer<Option<Target>> {
        Ok(Some(Target { id: id.to_owned(), port }))
    }

    #[test]
    fn a_domain_with_a_port_is_that_domain() {
        for (host, wanted) in [
            ("80-iab.box.test:8443", is("iab", 80)),
            ("80-iab.Box.test", is("iab", 80)),
            ("80-iab.box.test.:443", is("iab", 80)),
            ("api.box.test:8443", Ok(None)),
        ] {
            let map = HeaderMap::from_iter([(HOST, HeaderValue::from_static(host))]);
            assert_eq!(Target::of(&map, Some("box.test:8443")), wanted, "{host}");
        }
    }

    #[test]
    fn a_request_names_one_port_of_one_sandbox_or_none() {
        assert_eq!(target(&[("host", "localhost:3000")]), Ok(None));
        assert_eq!(target(&[("host", "api.box.test")]), Ok(None));
        assert_eq!(target(&[("e2b-sandbox-id", "iab")]), is("iab", 49983));
        assert_eq!(target(&[("e2b-sandbox-id", "iab"), ("e2b-sandbox-port", "80")]), is("iab", 80));
        assert_eq!(target(&[("host", "80-iab.box.test")]), is("iab", 80));
        assert_eq!(target(&[("host", "80-IAB.Box.Test:3000")]), is("iab", 80));
        assert_eq!(target(&[("host", "80-iab.box.test"), ("e2b-sandbox-id", "iab")]), is("iab", 80));
        assert_eq!(target(&[("host", "80-iab.box.test"), ("x-api-key", "k"), ("e2b-sandbox-id", "i")]), is("iab", 80));
        assert_eq!(target(&[("host", "x"), ("x-api-key", "k"), ("e2b-sandbox-id", "iab")]), Ok(None));
        assert_eq!(target(&[("host", "80-iab.other.test")]), Ok(None));
        assert_eq!(target(&[("host", "80-iabbox.test")]), Ok(None));
        for wrong in [
            &[("host", "80-iab.box.test"), ("e2b-sandbox-id", "ibb")][..],
            &[("host", "80-iab.box.test"), ("e2b-sandbox-id", "iab"), ("e2b-sandbox-port", "81")],
            &[("host", "80-iab.box.test"), ("e2b-sandbox-port", "81")],
            &[("host", "80-iab.box.test"), ("host", "81-iab.box.test")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-id", "b")],
            &[("e2b-sandbox-port", "80")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-port", "65536")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-port", "x")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-port", "0")],
            &[("e2b-sandbox-id", "a"), ("e2b-sandbox-port", "+80")],
            &[("host", "0-iab.box.test")],
            &[("host", "080-iab.box.test")],
            &[("host", "+80-iab.box.test")],
            &[("host", "80-i.ab.box.test")],
            &[("host", "80-.box.test")],
            &[("host", "iab.box.test")],
            &[("host", "70000-iab.box.test")],
        ] {
            assert_eq!(target(wrong).map_err(|error| error.status), Err(StatusCode::BAD_REQUEST), "{wrong:?}");
        }
    }
}
