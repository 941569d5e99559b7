//! Dispatch of requests.

use std::sync::Arc;
use std::time::Duration;

use clade_agent_proto::api::{Generation, Init, Shutdown};
use clade_agent_proto::process::Empty;
use clade_agent_proto::{Code, RpcError, decode};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};

use crate::agent::Agent;
use crate::auth::has_token;
use crate::clock;
use crate::connect::{client_stream, error, server_stream, unary};
use crate::connection::{Connection, Peer};
use crate::files;
use crate::http::{Reply, Shared, http_error, json, no_content, whole};
use crate::log::log;
use crate::metrics::read_metrics;
use crate::settings::Token;
use crate::shutdown::GRACE;

/// Marks requests that a program of the host passes on for others, and which are not the host's
/// own.
const PASSED_ON: &str = "x-clade-passed-on";
/// Clock differences that `/init` does not correct: behind and ahead.
const BEHIND_NS: i128 = 50_000_000;
const AHEAD_NS: i128 = 5 * clock::SECOND_NS;

/// Answers a request.
pub(crate) async fn route(agent: Shared, own: Connection, request: Request<Incoming>) -> Reply {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut own = own;
    if request.headers().contains_key(PASSED_ON) {
        own.peer = Peer::Other;
    }
    // These need no token, or check it themselves.
    let is_open =
        matches!((&method, path.as_str()), (&Method::GET, "/health" | "/files") | (&Method::POST, "/files" | "/init"));
    let (token, is_locked) = {
        let settings = agent.settings();
        (settings.token.clone(), settings.is_locked)
    };
    if path.starts_with("/clade/") {
        return clade(agent, own, &method, &path, request).await;
    }
    if is_locked && own.peer != Peer::Trusted && path != "/health" {
        return http_error(StatusCode::UNAUTHORIZED, "the VM is a new one, and the host has set no token yet");
    }
    if !is_open && !has_token(token.as_ref(), request.headers()) {
        let why = "unauthorized access, please provide a valid access token or method signing if supported";
        return http_error(StatusCode::UNAUTHORIZED, why);
    }
    if path.starts_with("/process.Process/") || path.starts_with("/filesystem.Filesystem/") {
        if method != Method::POST {
            return http_error(StatusCode::METHOD_NOT_ALLOWED, "calls are POST requests");
        }
        return call(agent, &path, request).await;
    }
    plain(agent, &method, &path, request).await
}

async fn plain(agent: Shared, method: &Method, path: &str, request: Request<Incoming>) -> Reply {
    let (head, mut body) = request.into_parts();
    match (method, path) {
        (&Method::GET, "/health") => no_content(),
        (&Method::GET, "/metrics") => match read_metrics(&agent.cpu) {
            Ok(metrics) => json(&metrics),
            Err(error) => http_error(StatusCode::INTERNAL_SERVER_ERROR, error),
        },
        (&Method::GET, "/envs") => {
            let envs = Arc::clone(&agent.settings().envs);
            json(&*envs)
        }
        (&Method::GET, "/files") => files::download(&agent, &head).await,
        (&Method::POST, "/files") => files::upload(&agent, &head, body).await,
        (&Method::POST, "/init") => match whole(&agent, &mut body).await {
            Ok(bytes) => init(&agent, &bytes).await,
            Err(error) => http_error(StatusCode::BAD_REQUEST, error),
        },
        (_, "/health" | "/metrics" | "/envs" | "/files" | "/init") => {
            http_error(StatusCode::METHOD_NOT_ALLOWED, format_args!("{path} is not for {method}"))
        }
        _ => http_error(StatusCode::NOT_FOUND, format_args!("there is no {path}")),
    }
}

/// `POST /init`.
async fn init(agent: &Agent, bytes: &[u8]) -> Reply {
    let request: Init = match decode(bytes) {
        Ok(request) => request,
        Err(error) => return http_error(StatusCode::BAD_REQUEST, error),
    };
    let time = match request.timestamp.as_deref().map(|text| clock::parse_rfc3339(text).ok_or(text)).transpose() {
        Ok(time) => time,
        Err(text) => return http_error(StatusCode::BAD_REQUEST, format_args!("invalid time {text:?}")),
    };
    let _turn = agent.turn.lock().await;
    let mut settings = agent.settings();
    let token = Token::of(request.access_token);
    // Any client sets the first token. Later only its holder may: a reset is reserved to the host,
    // by /clade/generation.
    if settings.token.is_some() && settings.token != token {
        let why = if token.is_some() { "access token validation failed" } else { "access token reset not authorized" };
        return http_error(StatusCode::UNAUTHORIZED, why);
    }
    if let Some(time) = time {
        if time <= settings.newest_ns {
            // An older request that arrives late has no effect.
            return no_content();
        }
        settings.newest_ns = time;
        let ahead = clock::now_ns() - time;
        if !(-BEHIND_NS..=AHEAD_NS).contains(&ahead)
            && let Err(error) = clock::set(time)
        {
            log!("the clock: {error}");
        }
    }
    settings.token = token;
    settings.is_locked = false;
    if let Some(envs) = request.env_vars {
        // Added, as in envd: a child of a snapshot keeps the variables that the image of its memory has.
        Arc::make_mut(&mut settings.envs).extend(envs);
    }
    if let Some(user) = request.default_user.filter(|user| !user.is_empty()) {
        settings.user = user;
    }
    if let Some(workdir) = request.default_workdir.filter(|workdir| !workdir.is_empty()) {
        settings.workdir = Some(workdir);
    }
    no_content()
}

/// Requests reserved to the host.
async fn clade(agent: Shared, own: Connection, method: &Method, path: &str, request: Request<Incoming>) -> Reply {
    if own.peer != Peer::Trusted {
        return http_error(StatusCode::FORBIDDEN, "only the host may ask for that");
    }
    if method != Method::POST {
        return http_error(StatusCode::METHOD_NOT_ALLOWED, format_args!("{path} is not for {method}"));
    }
    let mut body = request.into_body();
    let bytes = match whole(&agent, &mut body).await {
        Ok(bytes) => bytes,
        Err(error) => return http_error(StatusCode::BAD_REQUEST, error),
    };
    let invalid = |error| http_error(StatusCode::BAD_REQUEST, error);
    match path {
        "/clade/generation" => match decode::<Generation>(&bytes) {
            Ok(request) => json(&agent.change_generation(request, &own.is_kept).await),
            Err(error) => invalid(error),
        },
        "/clade/layer/begin" => agent.begin_layer().await,
        "/clade/layer" => agent.layer().await,
        "/clade/shutdown" => match decode::<Shutdown>(if bytes.is_empty() { b"{}" } else { &bytes }) {
            Ok(request) => {
                agent.ask_for_end(request.grace_ms.map_or(GRACE, Duration::from_millis));
                no_content()
            }
            Err(error) => invalid(error),
        },
        _ => http_error(StatusCode::NOT_FOUND, format_args!("there is no {path}")),
    }
}

async fn call(agent: Shared, path: &str, request: Request<Incoming>) -> Reply {
    let own = Shared::clone(&agent);
    match path {
        "/process.Process/List" => unary(&agent, request, |Empty {}, _| async move { Ok(own.list()) }).await,
        "/process.Process/Start" => {
            server_stream(&agent, request, |asked, caller, sink| own.start(asked, caller, sink)).await
        }
        "/process.Process/Connect" => {
            server_stream(&agent, request, |asked, caller, sink| own.connect(asked, caller, sink)).await
        }
        "/process.Process/Update" => unary(&agent, request, |asked, _| async move { own.update(&asked) }).await,
        "/process.Process/StreamInput" => {
            client_stream(&agent, request, |messages| async move { own.stream_input(messages).await }).await
        }
        "/process.Process/SendInput" => {
            unary(&agent, request, |asked, _| async move { own.send_input(asked).await }).await
        }
        "/process.Process/CloseStdin" => {
            unary(&agent, request, |asked, _| async move { own.close_stdin(asked).await }).await
        }
        "/process.Process/SendSignal" => {
            unary(&agent, request, |asked, _| async move { own.send_signal(&asked) }).await
        }
        "/filesystem.Filesystem/Stat" => {
            unary(&agent, request, |asked, caller| async move { own.stat(asked, caller).await }).await
        }
        "/filesystem.Filesystem/MakeDir" => {
            unary(&agent, request, |asked, caller| async move { own.make_dir(asked, caller).await }).await
        }
        "/filesystem.Filesystem/Move" => {
            unary(&agent, request, |asked, caller| async move { own.rename(asked, caller).await }).await
        }
        "/filesystem.Filesystem/ListDir" => {
            unary(&agent, request, |asked, caller| async move { own.list_dir(asked, caller).await }).await
        }
        "/filesystem.Filesystem/Remove" => {
            unary(&agent, request, |asked, caller| async move { own.remove(asked, caller).await }).await
        }
        "/filesystem.Filesystem/WatchDir" => {
            server_stream(&agent, request, |asked, caller, sink| own.watch_dir(asked, caller, sink)).await
        }
        "/filesystem.Filesystem/CreateWatcher" => {
            unary(&agent, request, |asked, caller| async move { own.create_watcher(asked, caller).await }).await
        }
        "/filesystem.Filesystem/GetWatcherEvents" => {
            unary(&agent, request, |asked, _| async move { own.watcher_events(&asked) }).await
        }
        "/filesystem.Filesystem/RemoveWatcher" => {
            unary(&agent, request, |asked, _| async move { own.remove_watcher(&asked) }).await
        }
        _ => error(&RpcError::new(Code::Unimplemented, format_args!("there is no {path}"))),
    }
}
