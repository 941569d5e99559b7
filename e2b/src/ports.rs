//! Requests for a sandbox's port, passed on to its guest.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONNECTION, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use clade_agent_client::Endpoint;
use clade_agent_client::proto::PORT;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;

use crate::error::{Answer, ApiError};
use crate::gateway::Gateway;

const SANDBOX_ID: HeaderName = HeaderName::from_static("e2b-sandbox-id");
const SANDBOX_PORT: HeaderName = HeaderName::from_static("e2b-sandbox-port");
/// Shown in calls of the API alone.
pub(crate) const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// What concerns a connection, or this host alone.
const NOT_PASSED_ON: [HeaderName; 11] = [
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
];
/// How long a guest may take to take a connection.
const CONNECTING: Duration = Duration::from_secs(10);
/// Most headers of a guest's answer.
const MAX_HEADERS: usize = 64;
/// Most bytes of their head.
const MAX_HEAD: usize = 64 << 10;

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
    text.map(Some).ok_or_else(|| ApiError::bad(format!("{name} is there twice, or is no text")))
}

/// `PORT-ID`, as a label in front of a domain.
fn labelled(label: &str) -> Option<Target> {
    let (port, id) = label.split_once('-')?;
    let is_name = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric());
    is_name.then_some(())?;
    // A number is written in one way alone.
    let is_number = port.bytes().all(|b| b.is_ascii_digit()) && !port.starts_with('0');
    is_number.then_some(())?;
    Some(Target { id: id.to_owned(), port: port.parse().ok()? })
}

impl Target {
    /// What a request is for: none if it is a call of the API. The headers and the host must not
    /// name two. A call has an API key, and older SDKs say in some which sandbox it is about.
    pub(crate) fn of(headers: &HeaderMap, domain: Option<&str>) -> Answer<Option<Self>> {
        let host = one(headers, &HOST)?.unwrap_or_default().to_ascii_lowercase();
        let host = host.split_once(':').map_or(host.as_str(), |(host, _)| host);
        let by_host = domain
            .and_then(|domain| host.strip_suffix(domain)?.strip_suffix('.'))
            .map(|label| labelled(label).ok_or_else(|| ApiError::bad(format!("{host:?} names no sandbox's port"))));
        // The API itself is below the domain, too.
        let is_api = domain.is_some_and(|domain| host.strip_suffix(domain) == Some("api."));
        let by_host = by_host.filter(|_| !is_api).transpose()?;
        if headers.contains_key(API_KEY) {
            return Ok(by_host);
        }
        let port = match one(headers, &SANDBOX_PORT)? {
            Some(port) => Some(port.parse().map_err(|_| ApiError::bad(format!("E2b-Sandbox-Port={port:?}")))?),
            None => None,
        };
        let Some(id) = one(headers, &SANDBOX_ID)? else {
            return match port {
                Some(_) if by_host.is_none() => Err(ApiError::bad("E2b-Sandbox-Port without E2b-Sandbox-Id")),
                Some(port) if by_host.as_ref().is_some_and(|target| target.port != port) => {
                    Err(ApiError::bad("E2b-Sandbox-Port is not the host's"))
                }
                _ => Ok(by_host),
            };
        };
        let target = Self { id: id.to_ascii_lowercase(), port: port.unwrap_or(PORT as u16) };
        match by_host {
            // The port is in the host's name where it is not in a header.
            Some(other) if other.id != target.id || port.is_some_and(|port| port != other.port) => {
                Err(ApiError::bad("E2b-Sandbox-Id and E2b-Sandbox-Port are not the host's"))
            }
            Some(other) => Ok(Some(other)),
            None => Ok(Some(target)),
        }
    }
}

/// E2B's proxy says so where there is nobody to ask.
fn bad_gateway(id: &str, message: &str) -> Response {
    let body = serde_json::json!({"sandboxId": id, "message": message, "code": 502});
    (StatusCode::BAD_GATEWAY, axum::Json(body)).into_response()
}

/// Drops the headers that are not passed on, and those that `Connection` names.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&NOT_PASSED_ON).chain([&SANDBOX_PORT]) {
        headers.remove(name);
    }
}

/// Whether a path is for the host alone: what makes a sandbox another, ends it, or sets its token.
fn is_the_hosts(path: &str) -> bool {
    path == "/init" || path == "/clade" || path.starts_with("/clade/")
}

/// Passes a request on to the agent of a sandbox, and its answer back, both as they come.
pub(crate) async fn forward(gateway: &Gateway, target: &Target, mut request: Request) -> Response {
    let Target { id, port } = target;
    let Some(entry) = gateway.0.sandboxes.get(id) else { return bad_gateway(id, "The sandbox was not found") };
    if u32::from(*port) != PORT {
        return bad_gateway(id, &format!("The sandbox is running but port {port} is not open"));
    }
    if is_the_hosts(request.uri().path()) {
        return ApiError::new(StatusCode::FORBIDDEN, format!("{} is for the host", request.uri().path()))
            .into_response();
    }
    if request.headers().contains_key(UPGRADE) {
        return ApiError::new(StatusCode::NOT_IMPLEMENTED, "connections are not upgraded").into_response();
    }
    let record = entry.get();
    if record.paused {
        if !record.auto_resume {
            return bad_gateway(id, "The sandbox is paused");
        }
        if let Err(error) = gateway.resume(&entry, None, None).await {
            return error.into_response();
        }
    }
    strip(request.headers_mut());
    request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    let endpoint = Endpoint::Vsock { socket: record.socket, port: PORT };
    let socket = match endpoint.connect(CONNECTING).await {
        Ok(socket) => socket,
        Err(error) => return bad_gateway(id, &format!("The sandbox does not answer: {error}")),
    };
    let mut http = http1::Builder::new();
    http.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD);
    let answer = async {
        let (mut sender, connection) = http.handshake(TokioIo::new(socket)).await?;
        // It ends when the answer has been read, or is dropped.
        tokio::spawn(connection);
        sender.send_request(request).await
    };
    match answer.await {
        Ok(answer) => {
            let mut answer = answer.map(Body::new);
            strip(answer.headers_mut());
            answer
        }
        Err(error) => bad_gateway(id, &format!("The sandbox has cut the connection: {error}")),
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn what_is_the_hosts_or_the_connections_is_not_passed_on() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "x-mine, close"),
            ("x-mine", "1"),
            ("x-api-key", "secret"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("e2b-sandbox-id", "a"),
            ("e2b-sandbox-port", "1"),
            ("x-access-token", "kept"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-access-token"]);
        for path in ["/init", "/clade/shutdown", "/clade/generation", "/clade"] {
            assert!(is_the_hosts(path), "{path}");
        }
        assert!(!is_the_hosts("/files") && !is_the_hosts("/process.Process/Start"));
    }
}
