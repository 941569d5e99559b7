//! Requests for a sandbox's port, forwarded to its guest: to the agent, or to a program's TCP port.
#![allow(clippy::result_large_err, reason = "an answer is the answer also where it refuses: one for each request")]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{HOST, UPGRADE};
use axum::http::uri::PathAndQuery;
use axum::http::{Extensions, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use clade_agent_client::proto::PORT;
use clade_agent_client::proto::forward::FORWARD_PORT;
use clade_agent_client::{ClientError, Endpoint, Socket};
use clade_api::http::holding;
use http_body_util::BodyExt;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::connection_limits::GuestEnd;
use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::headers::{
    AGENT_TOKEN, PASSED_ON, TRAFFIC_TOKEN, asks_for_websocket, check_framing, offer_websocket, strip,
    strip_for_program, takes_websocket,
};
use crate::ports::Target;
use crate::records::{RecordEntry, SandboxRecord};
use crate::seats::admit;
use crate::tunnel::{Afterwards, relay};

#[cfg(test)]
mod tests;

/// Time limit of a guest for a connection: the SDKs wait as long for an answer.
const CONNECTING: Duration = Duration::from_secs(60);
/// The same for a program's port. Its agent tries two addresses, for 30 s each.
const CONNECTING_TO_PORT: Duration = Duration::from_secs(90);
/// Most headers of a guest's answer.
const MAX_HEADERS: usize = 64;
/// Most bytes of a guest's answer's head.
const MAX_HEAD: usize = 64 << 10;

/// Answers as E2B's proxy does for an unreachable guest.
fn bad_gateway(target: &Target, message: &str) -> Response {
    let body = json!({"sandboxId": target.id, "port": target.port, "message": message, "code": 502});
    (StatusCode::BAD_GATEWAY, axum::Json(body)).into_response()
}

/// Returns whether only the host may use a path: those that change a sandbox's identity, end it, or
/// set its token.
fn is_the_hosts(path: &str) -> bool {
    path == "/init" || path == "/clade" || path.starts_with("/clade/")
}

/// Forwards a request to a port of a sandbox, and its answer back, both as a stream.
pub(crate) async fn forward(gateway: &Gateway, target: &Target, request: Request) -> Response {
    let Some(entry) = gateway.0.sandboxes.get(&target.id) else {
        return bad_gateway(target, "The sandbox was not found");
    };
    let admitted = match admit(&request) {
        Ok(admitted) => admitted,
        Err(error) => return error.into_response(),
    };
    let passed = if u32::from(target.port) == PORT {
        to_agent(gateway, target, &entry, request).await
    } else {
        to_program(gateway, target, &entry, request).await
    };
    passed.unwrap_or_else(|refusal| refusal).map(|body| holding(body, admitted))
}

/// Returns the running sandbox, and a receiver for its end. Wakes a paused one if `may_wake`.
async fn running(
    gateway: &Gateway,
    target: &Target,
    entry: &Arc<RecordEntry<SandboxRecord>>,
    may_wake: bool,
) -> Result<(SandboxRecord, watch::Receiver<()>), Response> {
    // Before the record is read: a pause is noted in the record first, and then sent.
    let mut cut = entry.cut.subscribe();
    let mut record = entry.get();
    if record.paused {
        if !record.auto_resume || !may_wake {
            return Err(bad_gateway(target, "The sandbox is paused"));
        }
        // One at a time: a wake goes on without its client, and more of them would hold up the owner's changes.
        let waking = Arc::clone(&entry.waking).lock_owned().await;
        if entry.get().paused {
            let woken = Arc::clone(entry);
            let resumed = |gateway: Gateway| async move {
                let _waking = waking;
                gateway.resume(&woken, None, None, None).await
            };
            gateway.to_the_end(resumed).await.map_err(GatewayError::into_response)?;
        }
        cut = entry.cut.subscribe();
        record = entry.get();
        if record.paused {
            return Err(bad_gateway(target, "The sandbox is paused"));
        }
    }
    Ok((record, cut))
}

/// Reduces the request's target to its path.
fn to_origin(request: &mut Request) {
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    *request.extensions_mut() = Extensions::new();
}

async fn to_agent(
    gateway: &Gateway,
    target: &Target,
    entry: &Arc<RecordEntry<SandboxRecord>>,
    mut request: Request,
) -> Result<Response, Response> {
    let refused = |status, why: String| Err(GatewayError::new(status, why).into_response());
    if is_the_hosts(request.uri().path()) {
        return refused(StatusCode::FORBIDDEN, format!("{} is for the host", request.uri().path()));
    }
    if request.headers().contains_key(UPGRADE) {
        return refused(StatusCode::NOT_IMPLEMENTED, "connections to the agent are not upgraded".to_owned());
    }
    // The agent checks the token of each request, which wakes a paused sandbox.
    let mut shown = request.headers().get_all(AGENT_TOKEN).iter();
    let may_wake = match (shown.next(), shown.next()) {
        (Some(token), None) => gateway.is_token(&target.id, token.as_bytes()),
        _ => false,
    };
    let limits = &gateway.0.connection_limits;
    // The agent judges a request without the token, which may have a signature.
    let place = if may_wake {
        limits.take(&target.id, &entry.get().owner, GuestEnd::Agent)
    } else {
        limits.take_stranger(&target.id, &entry.get().owner)
    };
    let place = place.map_err(GatewayError::into_response)?;
    let (record, _) = running(gateway, target, entry, may_wake).await?;
    strip(request.headers_mut());
    request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    request.headers_mut().insert(PASSED_ON, HeaderValue::from_static("1"));
    to_origin(&mut request);
    let endpoint = Endpoint::Vsock { socket: record.socket, port: PORT };
    let socket = endpoint.connect(CONNECTING).await;
    let socket = socket.map_err(|error| bad_gateway(target, &format!("The sandbox does not answer: {error}")))?;
    // The place is held until the connection has ended.
    let never = async move {
        let _place = place;
        std::future::pending::<()>().await;
    };
    let mut answer = send(gateway.0.answering, target, socket, request, never).await?;
    strip(answer.headers_mut());
    Ok(answer)
}

fn broken(target: &Target, error: &hyper::Error) -> Response {
    bad_gateway(target, &format!("The sandbox has cut the connection: {error}"))
}

/// Sends a request on a connection of its own, which ends when the answer has been read, is
/// dropped, or is `cut`.
async fn send(
    answering: Duration,
    target: &Target,
    socket: Socket,
    request: Request,
    cut: impl Future<Output = ()> + Send + 'static,
) -> Result<Response, Response> {
    let failed = |error: hyper::Error| broken(target, &error);
    let mut http = http1::Builder::new();
    http.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD);
    let (mut sender, connection) = http.handshake(TokioIo::new(socket)).await.map_err(failed)?;
    tokio::spawn(async move {
        tokio::select! {
            // The waiter for the answer reports a failure.
            _ = connection.with_upgrades() => {}
            () = cut => {}
        }
    });
    let moved = Arc::new(Mutex::new(Instant::now()));
    let last = Arc::clone(&moved);
    let request = request.map(|body| {
        Body::new(body.map_frame(move |frame| {
            *moved.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            frame
        }))
    });
    let mut answer = std::pin::pin!(sender.send_request(request));
    loop {
        let deadline = *last.lock().unwrap_or_else(PoisonError::into_inner) + answering;
        match timeout_at(deadline, answer.as_mut()).await {
            Ok(answer) => return Ok(answer.map_err(failed)?.map(Body::new)),
            // The body may have moved meanwhile.
            Err(_) if *last.lock().unwrap_or_else(PoisonError::into_inner) + answering <= Instant::now() => {
                let why = format!("the sandbox has not answered within {} s", answering.as_secs_f64());
                return Err(GatewayError::new(StatusCode::GATEWAY_TIMEOUT, why).into_response());
            }
            Err(_) => {}
        }
    }
}

/// Refuses requests without the token of a sandbox whose ports are not public.
fn check_traffic(gateway: &Gateway, record: &SandboxRecord, request: &Request) -> Answer<()> {
    if !record.is_private {
        return Ok(());
    }
    let mut shown = request.headers().get_all(TRAFFIC_TOKEN).iter();
    let refused = |what: &str| Err(GatewayError::new(StatusCode::FORBIDDEN, format!("{TRAFFIC_TOKEN}: {what}")));
    match (shown.next(), shown.next()) {
        (None, _) => refused("the sandbox's ports are not public"),
        (Some(token), None) if gateway.is_traffic_token(&record.id, token.as_bytes()) => Ok(()),
        _ => refused("is not the sandbox's"),
    }
}

/// Answers for a failed connection to a program's port. A closed port is E2B's own case.
fn not_open(target: &Target, error: &ClientError) -> Response {
    let message = match error {
        ClientError::PortClosed { port, why } => format!("The sandbox is running but port {port} is not open: {why}"),
        error => format!("The sandbox does not answer: {error}"),
    };
    bad_gateway(target, &message)
}

async fn to_program(
    gateway: &Gateway,
    target: &Target,
    entry: &Arc<RecordEntry<SandboxRecord>>,
    request: Request,
) -> Result<Response, Response> {
    let refused = GatewayError::into_response;
    check_framing(request.headers()).map_err(refused)?;
    // Both checks come before the wake.
    let record = entry.get();
    check_traffic(gateway, &record, &request).map_err(refused)?;
    let slot = gateway.0.connection_limits.take(&record.id, &record.owner, GuestEnd::Port);
    let place = Arc::new(slot.map_err(refused)?);
    let afterwards = request.extensions().get::<Afterwards>().cloned();
    // A WebSocket is an admitted request until it ends.
    let seat = admit(&request).map_err(refused)?;
    let (head, body) = request.into_parts();
    let is_websocket = asks_for_websocket(&head).map_err(refused)?;
    let mut request = Request::from_parts(head, body);
    let client = is_websocket.then(|| hyper::upgrade::on(&mut request));
    let (record, mut cut) = running(gateway, target, entry, true).await?;
    strip_for_program(request.headers_mut());
    if is_websocket {
        offer_websocket(request.headers_mut());
    }
    // The host is the client's, unless the sandbox's owner has set another.
    if let Some(mask) = &record.masked_host
        && let Ok(host) = HeaderValue::from_str(&mask.replace("${PORT}", &target.port.to_string()))
    {
        request.headers_mut().insert(HOST, host);
    }
    to_origin(&mut request);
    let endpoint = Endpoint::Vsock { socket: record.socket, port: FORWARD_PORT };
    let socket =
        endpoint.connect_tcp(target.port, CONNECTING_TO_PORT).await.map_err(|error| not_open(target, &error))?;
    let mut ended = cut.clone();
    let held = Arc::clone(&place);
    // The sender goes with the sandbox. The place is held until the connection has ended, whatever
    // its end.
    let until_cut = async move {
        drop(ended.changed().await);
        drop(held);
    };
    let mut answer = send(gateway.0.answering, target, socket, request, until_cut).await?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let is_taken = takes_websocket(answer.headers());
        let (Some(client), Some(afterwards), true) = (client, afterwards, is_taken) else {
            return Err(bad_gateway(target, "The sandbox has changed the protocol, which it was not asked for"));
        };
        let guest = hyper::upgrade::on(&mut answer);
        afterwards.set(async move {
            let _held = (place, seat);
            tokio::select! {
                () = tunnel(client, guest) => {}
                _ = cut.changed() => {}
            }
        });
        strip_for_program(answer.headers_mut());
        offer_websocket(answer.headers_mut());
        *answer.body_mut() = Body::empty();
        return Ok(answer);
    }
    strip_for_program(answer.headers_mut());
    Ok(answer)
}

async fn tunnel(client: OnUpgrade, guest: OnUpgrade) {
    match tokio::try_join!(client, guest) {
        Ok((client, guest)) => relay(TokioIo::new(client), TokioIo::new(guest)).await,
        Err(error) => tracing::debug!(%error, "a WebSocket"),
    }
}
