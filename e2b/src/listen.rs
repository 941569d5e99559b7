//! The listener of the API.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use clade_api::http::bind_tcp;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::control;
use crate::gateway::Gateway;
use crate::ports::Target;
use crate::proxy::forward;
use crate::seats::{Seat, Seats};
use crate::tls::Tls;
use crate::tunnel::Afterwards;

/// Most connections. A further one takes the seat of an idle one, of the network that has the most;
/// if all are busy, it waits in the kernel's backlog.
const MAX_CONNECTIONS: usize = 2048;
/// Time limit of an idle connection, and of a request's head: longer than SDKs keep one.
const HEADER_TIMEOUT: Duration = Duration::from_secs(330);
/// The largest head of a request, in bytes, and the most headers.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 64;
/// The idle time before a peer is probed, the interval of probes, and the number of unanswered ones
/// that end a connection.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_COUNT: u32 = 4;
/// The delay after a connection could not be accepted. Retrying sooner frees no descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

/// Reason why the API is not served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Others than this host's users could read the connections.
    #[error("{address} is not a loopback address: there the API needs a certificate, or a proxy with TLS before it")]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be bound.
    #[error("{address} cannot be listened on")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The socket's error.
        #[source]
        source: io::Error,
    },
}

/// Separates requests for sandboxes' ports from calls of the API.
async fn dispatch(State(gateway): State<Gateway>, request: Request, next: Next) -> Response {
    match Target::of(request.headers(), gateway.0.domain.as_deref()) {
        Ok(Some(target)) => forward(&gateway, &target, request).await,
        Ok(None) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Routes both calls and requests for sandboxes' ports.
pub(crate) fn router(gateway: &Gateway) -> Router {
    control::router(gateway).layer(from_fn_with_state(gateway.clone(), dispatch))
}

/// Answers a connection's requests until it ends, or its seat is taken.
pub(crate) async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    seat: Arc<Seat>,
) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    let (service, afterwards) = (TowerToHyperService::new(router), Afterwards::default());
    let (own, own_seat) = (afterwards.clone(), Arc::clone(&seat));
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(own.clone());
        request.extensions_mut().insert(Arc::clone(&own_seat));
        service.call(request)
    });
    let served = tokio::select! {
        served = http.serve_connection(TokioIo::new(stream), service).with_upgrades() => served,
        () = seat.until_cut() => return,
    };
    if let Err(error) = served {
        // The client went away, or was too slow.
        tracing::debug!(%error, "a connection to E2B's API");
    }
    if let Some(work) = afterwards.take() {
        work.await;
    }
}

/// The same for a connection that begins with a handshake.
async fn answer_tls(tls: Arc<Tls>, stream: TcpStream, router: Router, seat: Arc<Seat>) {
    let stream = tokio::select! {
        stream = tls.accept(stream) => stream,
        () = seat.until_cut() => None,
    };
    if let Some(stream) = stream {
        answer(stream, router, seat).await;
    }
}

/// Has the kernel end a connection whose peer has vanished: it would hold its seat for ever.
fn notice_vanished(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    let unacknowledged = KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_COUNT;
    sockopt::set_tcp_user_timeout(stream, unacknowledged.as_millis() as u32)
}

pub(crate) async fn accept(listener: TcpListener, router: Router, tls: Option<Arc<Tls>>) {
    accept_at_most(MAX_CONNECTIONS, listener, router, tls).await;
}

pub(crate) async fn accept_at_most(most: usize, listener: TcpListener, router: Router, tls: Option<Arc<Tls>>) {
    let seats = Seats::new(most);
    // Dropping this cuts the connections.
    let mut answering = JoinSet::new();
    loop {
        while answering.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, peer)) => {
                // The wait comes before the next connection is accepted.
                let seat = seats.take(peer.ip()).await;
                // An event is sent when it happens.
                let _ = stream.set_nodelay(true);
                if let Err(error) = notice_vanished(&stream) {
                    tracing::debug!(%error, "a connection to E2B's API without keepalive");
                }
                let (router, seat) = (router.clone(), Arc::new(seat));
                match &tls {
                    Some(tls) => answering.spawn(answer_tls(Arc::clone(tls), stream, router, seat)),
                    None => answering.spawn(answer(stream, router, seat)),
                };
            }
            Err(error) => {
                tracing::warn!(%error, "connections to E2B's API cannot be accepted");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// A port for the API, bound before there is a supervisor.
#[derive(Debug)]
pub struct BoundPort {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<Tls>>,
}

impl BoundPort {
    /// Binds an address: without `tls`, one of the host's own. Port 0 stands for a free one. Call it
    /// within a runtime.
    ///
    /// # Errors
    /// When the address cannot be bound, or needs TLS.
    pub fn bind(address: SocketAddr, tls: Option<Tls>) -> Result<Self, ListenError> {
        if tls.is_none() && !address.ip().is_loopback() {
            return Err(ListenError::NotLoopback { address });
        }
        let failed = |source| ListenError::Bind { address, source };
        let (listener, bound) = bind_tcp(address).map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        Ok(Self { listener, address: bound, tls: tls.map(Arc::new) })
    }

    /// Returns the URL of the port.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves a gateway while polled.
    pub async fn serve(self, gateway: Gateway) {
        let router = router(&gateway);
        // First: VMs that calls make afterwards are of this supervisor.
        gateway.reconcile().await;
        // Tasks of their own: a panic in one ends no other. Dropping the set ends them.
        let mut keeping = JoinSet::new();
        let of = gateway.clone();
        keeping.spawn(async move { of.keep_time().await });
        keeping.spawn(async move { gateway.keep_swept().await });
        accept(self.listener, router, self.tls).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_ends_a_connection_whose_peer_has_vanished() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        assert!(!sockopt::socket_keepalive(&stream).unwrap());
        notice_vanished(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let idle = sockopt::tcp_keepidle(&stream).unwrap();
        let interval = sockopt::tcp_keepintvl(&stream).unwrap();
        let count = sockopt::tcp_keepcnt(&stream).unwrap();
        // Two minutes, also for a peer that does not acknowledge what was sent to it.
        assert_eq!(idle + interval * count, Duration::from_secs(120));
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 120_000);
    }
}
