//! The calls that make, list, change and end sandboxes.

mod templates;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Json, Router};
use clade_api::http::holding;
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::change_client::ChangeClient;
use crate::connection_limits::GuestEnd;
use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::headers::API_KEY;
use crate::idempotency::{KeyedCall, Made};
use crate::keys::Scope;
use crate::records::{RecordEntry, SandboxRecord, SnapshotRecord};
use crate::rules::checkpoint_name;
use crate::seats::admit;
use crate::wire::{
    AskedNetwork, CLIENT_ID, Connect, Detail, ENVD_VERSION, Lifecycle, ListQuery, ListedSandbox, NetworkShown,
    OnTimeout, Refresh, Sandbox, SandboxMetric, SaveOptions, SnapshotInfo, State as SandboxState, Texts, Timeout,
};

/// Most bytes of a call's body.
const MAX_BODY: usize = 1 << 20;
/// Time limit of a body.
const BODY_TIME: Duration = Duration::from_secs(10);
/// Default and largest number of a list's entries.
const PAGE: usize = 100;
const MAX_PAGE: usize = 1000;
/// Most sandboxes of one call for their load.
const MAX_METRICS: usize = 100;
/// Most of them asked at a time.
const MAX_METRICS_AT_ONCE: usize = 16;
const NEXT_TOKEN: &str = "x-next-token";

/// The owner of the resources that a call makes: the owner of its key.
#[derive(Clone, Debug)]
struct KeyOwner(String);

type GatewayState = State<Gateway>;
type Who = Extension<KeyOwner>;

/// A name in the path of a call.
struct InPath(String);

impl FromRequestParts<Gateway> for InPath {
    type Rejection = GatewayError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Answer<Self> {
        let named = Path::<String>::from_request_parts(parts, gateway).await;
        let Path(name) = named.map_err(|rejection| GatewayError::new(rejection.status(), rejection.body_text()))?;
        Ok(Self(name))
    }
}

/// The sandbox named in a call by its owner.
struct Own(Arc<RecordEntry<SandboxRecord>>);

impl FromRequestParts<Gateway> for Own {
    type Rejection = GatewayError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Answer<Self> {
        let InPath(id) = InPath::from_request_parts(parts, gateway).await?;
        let owner = parts.extensions.get::<KeyOwner>().ok_or_else(|| GatewayError::no_sandbox(&id))?;
        gateway.owned(&owner.0, &id).map(Self)
    }
}

/// Routes all calls. Unknown paths are a 404 of the same form.
pub(crate) fn router(gateway: &Gateway) -> Router {
    Router::new()
        .route("/sandboxes", get(list_running).post(create))
        .route("/v2/sandboxes", get(list).post(create))
        .route("/sandboxes/metrics", get(metrics_of_many))
        .route("/sandboxes/{id}", get(show).delete(kill))
        .route("/sandboxes/{id}/timeout", post(set_timeout))
        .route("/sandboxes/{id}/refreshes", post(refresh))
        .route("/sandboxes/{id}/pause", post(pause))
        .route("/sandboxes/{id}/resume", post(resume))
        .route("/sandboxes/{id}/connect", post(connect))
        .route("/v2/sandboxes/{id}/connect", post(connect))
        .route("/sandboxes/{id}/fork", post(fork))
        .route("/sandboxes/{id}/snapshots", post(snapshot))
        .route("/sandboxes/{id}/metrics", get(metrics))
        .route("/sandboxes/{id}/network", put(set_network))
        .route("/sandboxes/{id}/logs", get(logs))
        .route("/v2/sandboxes/{id}/logs", get(logs))
        .route("/snapshots", get(snapshots))
        .route("/snapshots/{id}/fork", post(fork_snapshot))
        .route("/templates", get(templates::list))
        .route("/v2/templates", get(templates::list))
        .route("/templates/{id}", delete(templates::remove))
        .route("/templates/aliases/{alias}", get(templates::alias))
        .route("/health", get(async || StatusCode::NO_CONTENT))
        .fallback(async |method: Method, uri: axum::http::Uri| {
            GatewayError::new(StatusCode::NOT_FOUND, format!("there is no {method} {}", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: axum::http::Uri| {
            GatewayError::new(StatusCode::METHOD_NOT_ALLOWED, format!("there is no {method} {}", uri.path()))
        })
        .layer(from_fn_with_state(gateway.clone(), authorize))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(gateway.clone())
}

/// Lets calls through whose key may make them.
async fn authorize(State(gateway): GatewayState, mut request: Request, next: Next) -> Response {
    // Monitors of the host request this without a key.
    if request.uri().path() == "/health" {
        return next.run(request).await;
    }
    // A request from any page in a browser of this host.
    if request.headers().contains_key("origin") {
        return GatewayError::new(StatusCode::FORBIDDEN, "calls of a browser's pages are not taken").into_response();
    }
    let unauthorized = |why: &str| GatewayError::new(StatusCode::UNAUTHORIZED, why).into_response();
    let shown = request.headers_mut().remove(API_KEY);
    let Some(shown) = shown.as_ref().and_then(|shown| shown.to_str().ok()) else {
        return unauthorized("X-API-Key is missing");
    };
    let key = match gateway.0.keys.find(shown) {
        Ok(Some(key)) => key,
        Ok(None) => return unauthorized("no such API key"),
        Err(error) => {
            tracing::error!(%error, "no key is taken");
            return unauthorized("the keys cannot be read");
        }
    };
    if !gateway.0.rates.admit(&key.name, Instant::now()) {
        return GatewayError::new(StatusCode::TOO_MANY_REQUESTS, "too many calls with this key").into_response();
    }
    if key.scope == Scope::Read && request.method() != Method::GET {
        return GatewayError::new(StatusCode::FORBIDDEN, "this key is for calls that change nothing").into_response();
    }
    let owner = key.owner().to_owned();
    let call = match gateway.0.calls.take_call(&owner) {
        Ok(call) => Arc::new(call),
        Err(error) => return error.into_response(),
    };
    let admitted = match admit(&request) {
        Ok(admitted) => admitted,
        Err(error) => return error.into_response(),
    };
    // Before the call may be refused: an answer to a request whose body has not come yet ends the connection, and its
    // client may be sending the next request.
    let (parts, body) = request.into_parts();
    let mut request = match body_bytes(Request::from_parts(parts.clone(), body)).await {
        Ok(bytes) => Request::from_parts(parts, bytes.into()),
        Err(error) => return error.into_response(),
    };
    request.extensions_mut().insert(key.scope);
    request.extensions_mut().insert(KeyOwner(owner.clone()));
    let answered = gateway.0.call_permits.run(&owner, &call, next.run(request)).await;
    answered.map(|body| holding(body, (call, admitted)))
}

async fn body_bytes(request: Request) -> Answer<Bytes> {
    let late = |_| GatewayError::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time");
    let read = tokio::time::timeout(BODY_TIME, Bytes::from_request(request, &())).await.map_err(late)?;
    read.map_err(|rejection| GatewayError::new(rejection.status(), rejection.body_text()))
}

/// Parses a body of JSON. Older calls may have none, with all fields at their defaults.
fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> Answer<T> {
    let text: &[u8] = if bytes.is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(text).map_err(|error| GatewayError::bad(format!("the body: {error}")))
}

async fn body<T: DeserializeOwned>(request: Request) -> Answer<T> {
    parsed(&body_bytes(request).await?)
}

/// Answers a call that makes something, or as it was answered before: see [`Replays`].
///
/// [`Replays`]: crate::idempotency::Replays
async fn made_once<W: DeserializeOwned + Send + 'static, T: Made + Send + 'static, F>(
    gateway: &Gateway,
    owner: String,
    request: Request,
    make: impl FnOnce(Gateway, String, W, ChangeClient) -> F + Send + 'static,
) -> Answer<Response>
where
    F: Future<Output = Answer<T>> + Send + 'static,
{
    let (path, headers) = (request.uri().path().to_owned(), request.headers().clone());
    let bytes = body_bytes(request).await?;
    let call = KeyedCall::of(&headers, &path, &bytes)?;
    let wanted: W = parsed(&bytes)?;
    let made = |gateway: Gateway, client: ChangeClient| async move {
        let make = |client| make(gateway.clone(), owner.clone(), wanted, client);
        gateway.0.replays.once(&owner, call, client, make).await
    };
    let json = gateway.to_the_end_for(made).await?;
    Ok((StatusCode::CREATED, [(CONTENT_TYPE, "application/json")], json.to_string()).into_response())
}

async fn create(State(gateway): GatewayState, Extension(owner): Who, request: Request) -> Answer<Response> {
    let create =
        |gateway: Gateway, owner: String, new, client| async move { gateway.create(&owner, new, client).await };
    made_once(&gateway, owner.0, request, create).await
}

fn listed(record: SandboxRecord) -> ListedSandbox {
    ListedSandbox {
        state: record.state(),
        template: record.template,
        id: record.id,
        client: CLIENT_ID,
        started_at: record.started_at,
        end_at: record.end_at,
        cpu_count: record.cpus,
        memory_mib: record.mib,
        disk_mib: 0,
        metadata: record.metadata,
        envd_version: ENVD_VERSION,
    }
}

/// Parses the pairs of a query string within a query, which has been decoded once.
fn pairs(query: &str) -> Answer<Texts> {
    let url = format!("http://x/?{query}").parse().map_err(|_| GatewayError::bad(format!("metadata={query:?}")))?;
    Query::<Texts>::try_from_uri(&url).map(|pairs| pairs.0).map_err(GatewayError::from)
}

/// Decodes the second encoding of each side.
fn unquoted(texts: Texts) -> Answer<Texts> {
    let mut plain = Texts::new();
    for (key, value) in texts {
        let all = pairs(&format!("{key}={value}"))?;
        plain.extend(all);
    }
    Ok(plain)
}

impl ListQuery {
    fn states(&self) -> Answer<Vec<SandboxState>> {
        let Some(states) = &self.state else { return Ok(vec![SandboxState::Running, SandboxState::Paused]) };
        let parse = |state: &str| match state {
            "running" => Ok(SandboxState::Running),
            "paused" => Ok(SandboxState::Paused),
            other => Err(GatewayError::bad(format!("state={other:?}: running or paused"))),
        };
        states.split(',').map(parse).collect()
    }

    fn metadata(&self) -> Answer<Texts> {
        self.metadata.as_deref().filter(|text| !text.is_empty()).map_or(Ok(Texts::new()), |text| unquoted(pairs(text)?))
    }

    /// Returns one page of a list sorted by `key`. The page begins behind the key that the last
    /// page ended with, even if its entry has gone.
    fn page<T>(&self, all: Vec<T>, order: SortOrder, key: impl Fn(&T) -> SortKey) -> Answer<(HeaderMap, Vec<T>)> {
        let limit = match self.limit.unwrap_or(PAGE) {
            limit @ 1..=MAX_PAGE => limit,
            limit => return Err(GatewayError::bad(format!("limit={limit}: 1 to {MAX_PAGE}"))),
        };
        let begin = match self.next_token.as_deref().filter(|token| !token.is_empty()) {
            Some(token) => {
                let (at, name) = token.split_once('-').unwrap_or_default();
                let at =
                    at.parse().map_err(|_| GatewayError::bad(format!("nextToken={token:?} is none of this list's")))?;
                let last: SortKey = (at, name.to_owned());
                let is_behind = |one: &T| match order {
                    SortOrder::Ascending => key(one) > last,
                    SortOrder::Descending => key(one) < last,
                };
                all.iter().position(is_behind).unwrap_or(all.len())
            }
            None => 0,
        };
        let left = all.len().saturating_sub(begin);
        let page: Vec<T> = all.into_iter().skip(begin).take(limit).collect();
        let mut headers = HeaderMap::new();
        let token = page.last().map(&key).map(|(at, name)| HeaderValue::from_str(&format!("{at}-{name}")));
        if let Some(Ok(token)) = token.filter(|_| left > limit) {
            headers.insert(NEXT_TOKEN, token);
        }
        Ok((headers, page))
    }
}

/// The sort key of lists: a time in nanoseconds, and a name.
type SortKey = (i128, String);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SortOrder {
    Ascending,
    Descending,
}

type ListQueryResult = Result<Query<ListQuery>, QueryRejection>;

fn filtered(gateway: &Gateway, owner: &KeyOwner, query: &ListQuery) -> Answer<(Vec<ListedSandbox>, SortOrder)> {
    let (states, metadata) = (query.states()?, query.metadata()?);
    // Sandboxes record it by its name.
    let name = |template: &str| gateway.source(&owner.0, template).map(|source| source.template);
    let template = query.template.as_deref().map(name).transpose()?;
    let is_wanted = |record: &SandboxRecord| {
        record.owner == owner.0
            && states.contains(&record.state())
            && metadata.iter().all(|(key, value)| record.metadata.get(key) == Some(value))
            && template.as_deref().is_none_or(|template| template == record.template)
            && query.started_after.is_none_or(|after| record.started_at > after)
    };
    let mut all: Vec<ListedSandbox> = gateway.0.sandboxes.such(is_wanted).into_iter().map(listed).collect();
    all.sort_by_key(listed_key);
    match query.order.as_deref() {
        None | Some("desc") => {
            all.reverse();
            Ok((all, SortOrder::Descending))
        }
        Some("asc") => Ok((all, SortOrder::Ascending)),
        Some(order) => Err(GatewayError::bad(format!("order={order:?}: asc or desc"))),
    }
}

fn listed_key(one: &ListedSandbox) -> SortKey {
    (one.started_at.as_nanosecond(), one.id.clone())
}

async fn list(
    State(gateway): GatewayState,
    Extension(owner): Who,
    query: ListQueryResult,
) -> Answer<(HeaderMap, Json<Vec<ListedSandbox>>)> {
    let Query(query) = query?;
    let (all, order) = filtered(&gateway, &owner, &query)?;
    let (headers, page) = query.page(all, order, listed_key)?;
    Ok((headers, Json(page)))
}

async fn list_running(
    State(gateway): GatewayState,
    Extension(owner): Who,
    query: ListQueryResult,
) -> Answer<Json<Vec<ListedSandbox>>> {
    let Query(query) = query?;
    let query = ListQuery { state: Some("running".to_owned()), ..query };
    Ok(Json(filtered(&gateway, &owner, &query)?.0))
}

async fn show(
    State(gateway): GatewayState,
    Extension(scope): Extension<Scope>,
    Own(entry): Own,
) -> Answer<Json<Detail>> {
    let record = entry.get();
    let on_timeout = if record.auto_pause { OnTimeout::Pause } else { OnTimeout::Kill };
    let lifecycle = Lifecycle { auto_resume: record.auto_resume, on_timeout };
    // The token makes its holder root in the guest, and so able to change it.
    let envd_access_token = (scope == Scope::All).then(|| gateway.token(&record.id));
    let domain = gateway.0.domain.clone();
    let AskedNetwork { is_allowed: allow_internet_access, allow_out, deny_out } = record.network.clone();
    let (allow_public_traffic, mask_request_host) = (!record.is_private, record.masked_host.clone());
    let network = NetworkShown { allow_public_traffic, allow_out, deny_out, mask_request_host };
    let listed = listed(record);
    Ok(Json(Detail { listed, envd_access_token, domain, allow_internet_access, network, lifecycle }))
}

async fn kill(State(gateway): GatewayState, Own(entry): Own) -> Answer<StatusCode> {
    gateway.to_the_end(|gateway| async move { gateway.kill(&entry).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn set_timeout(State(gateway): GatewayState, Own(entry): Own, request: Request) -> Answer<StatusCode> {
    let wanted: Timeout = body(request).await?;
    gateway.to_the_end(|gateway| async move { gateway.set_timeout(&entry, wanted.timeout).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn set_network(State(gateway): GatewayState, Own(entry): Own, request: Request) -> Answer<StatusCode> {
    let wanted: Value = body(request).await?;
    gateway.to_the_end(|gateway| async move { gateway.set_network(&entry, &wanted).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn refresh(State(gateway): GatewayState, Own(entry): Own, request: Request) -> Answer<StatusCode> {
    let wanted: Refresh = body(request).await?;
    let running = Some(SandboxState::Running);
    gateway.to_the_end(|gateway| async move { gateway.resume(&entry, wanted.duration, None, running).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn expect_memory(memory: Option<bool>) -> Answer<()> {
    match memory {
        Some(false) => Err(GatewayError::bad("memory=false: a sandbox is held with its memory here")),
        _ => Ok(()),
    }
}

async fn pause(State(gateway): GatewayState, Own(entry): Own, request: Request) -> Answer<StatusCode> {
    expect_memory(body::<SaveOptions>(request).await?.memory)?;
    gateway.to_the_end(|gateway| async move { gateway.pause(&entry, |_| true).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn resume(
    State(gateway): GatewayState,
    Own(entry): Own,
    request: Request,
) -> Answer<(StatusCode, Json<Sandbox>)> {
    let wanted: Connect = body(request).await?;
    expect_memory(wanted.memory)?;
    let paused = Some(SandboxState::Paused);
    let resumed =
        |gateway: Gateway| async move { gateway.resume(&entry, wanted.timeout, wanted.auto_pause, paused).await };
    let (sandbox, _) = gateway.to_the_end(resumed).await?;
    Ok((StatusCode::CREATED, Json(sandbox)))
}

async fn connect(
    State(gateway): GatewayState,
    Own(entry): Own,
    request: Request,
) -> Answer<(StatusCode, Json<Sandbox>)> {
    let wanted: Connect = body(request).await?;
    expect_memory(wanted.memory)?;
    let resumed = |gateway: Gateway| async move { gateway.resume(&entry, wanted.timeout, None, None).await };
    let (sandbox, was_paused) = gateway.to_the_end(resumed).await?;
    Ok((if was_paused { StatusCode::CREATED } else { StatusCode::OK }, Json(sandbox)))
}

async fn fork(
    State(gateway): GatewayState,
    Extension(owner): Who,
    InPath(id): InPath,
    request: Request,
) -> Answer<Response> {
    let fork =
        |gateway: Gateway, owner: String, fork, client| async move { gateway.fork(&owner, &id, fork, client).await };
    made_once(&gateway, owner.0, request, fork).await
}

async fn fork_snapshot(
    State(gateway): GatewayState,
    Extension(owner): Who,
    InPath(id): InPath,
    request: Request,
) -> Answer<Response> {
    let fork = |gateway: Gateway, owner: String, fork, client| async move {
        gateway.fork_snapshot(&owner, &id, fork, client).await
    };
    made_once(&gateway, owner.0, request, fork).await
}

async fn snapshot(
    State(gateway): GatewayState,
    Extension(owner): Who,
    InPath(id): InPath,
    request: Request,
) -> Answer<Response> {
    // A snapshot has a record before its answer, and stays without its client.
    let take = |gateway: Gateway, owner: String, wanted: SaveOptions, _| async move {
        expect_memory(wanted.memory)?;
        gateway.snapshot(&owner, &id, wanted.name).await
    };
    made_once(&gateway, owner.0, request, take).await
}

async fn snapshots(
    State(gateway): GatewayState,
    Extension(owner): Who,
    query: ListQueryResult,
) -> Answer<(HeaderMap, Json<Vec<SnapshotInfo>>)> {
    let Query(query) = query?;
    let mut all = gateway.0.snapshots.such(|one| {
        one.owner == owner.0
            && query.sandbox.as_ref().is_none_or(|sandbox| *sandbox == one.sandbox)
            && query.name.as_deref().is_none_or(|name| checkpoint_name(name) == one.shown())
    });
    let key = |one: &SnapshotRecord| (one.taken_at.as_nanosecond(), one.id.clone());
    all.sort_by_key(key);
    all.reverse();
    let (headers, page) = query.page(all, SortOrder::Descending, key)?;
    let shown =
        page.into_iter().map(|one| SnapshotInfo { id: one.shown().to_owned(), names: vec![one.shown().to_owned()] });
    Ok((headers, Json(shown.collect())))
}

async fn metric(gateway: &Gateway, record: &SandboxRecord) -> Answer<SandboxMetric> {
    if record.paused {
        return Err(GatewayError::conflict(format!("the sandbox {:?} is paused", record.id)));
    }
    // A connection as any other to the agent.
    let _slot = gateway.0.connection_limits.take(&record.id, &record.owner, GuestEnd::Agent)?;
    let load = gateway.agent_of(record).metrics().await?;
    let timestamp = Timestamp::now();
    Ok(SandboxMetric {
        timestamp,
        timestamp_unix: timestamp.as_second(),
        cpu_count: load.cpu_count,
        cpu_used_pct: load.cpu_used_pct,
        mem_used: load.mem_used,
        mem_total: load.mem_total,
        mem_cache: load.mem_cache,
        disk_used: load.disk_used,
        disk_total: load.disk_total,
    })
}

/// Returns the current load. No history is kept.
async fn metrics(State(gateway): GatewayState, Own(entry): Own) -> Answer<Json<Vec<SandboxMetric>>> {
    let record = entry.get();
    if record.paused {
        return Ok(Json(Vec::new()));
    }
    Ok(Json(vec![metric(&gateway, &record).await?]))
}

#[derive(Debug, Deserialize)]
struct MetricsQuery {
    sandbox_ids: String,
}

async fn metrics_of_many(
    State(gateway): GatewayState,
    Extension(owner): Who,
    query: Result<Query<MetricsQuery>, QueryRejection>,
) -> Answer<Json<Value>> {
    let Query(query) = query?;
    let ids: BTreeSet<&str> = query.sandbox_ids.split(',').filter(|id| !id.is_empty()).collect();
    if ids.len() > MAX_METRICS {
        return Err(GatewayError::bad(format!("{} sandboxes: at most {MAX_METRICS}", ids.len())));
    }
    let mut asked = tokio::task::JoinSet::new();
    let mut all = serde_json::Map::new();
    let mut note = |answer| {
        if let Ok((Ok(metric), id)) = answer {
            all.insert(id, json!(metric));
        }
    };
    for entry in ids.iter().filter_map(|id| gateway.owned(&owner.0, id).ok()) {
        // A guest may answer slowly, and much.
        if asked.len() >= MAX_METRICS_AT_ONCE
            && let Some(answer) = asked.join_next().await
        {
            note(answer);
        }
        let (gateway, record) = (gateway.clone(), entry.get());
        asked.spawn(async move { (metric(&gateway, &record).await, record.id) });
    }
    while let Some(answer) = asked.join_next().await {
        note(answer);
    }
    Ok(Json(json!({ "sandboxes": all })))
}

/// Returns the end of the guest's console output, which has no times: each line has that of the call.
async fn logs(State(gateway): GatewayState, Own(entry): Own) -> Answer<Json<Value>> {
    let answer = gateway.0.supervisor.logs(&entry.get().id).await?;
    let now = Timestamp::now();
    // The older call returns lines, the newer one messages.
    let entry = |line: &str| json!({"timestamp": now, "message": line, "line": line, "level": "info", "fields": {}});
    let entries: Vec<Value> = answer.console.lines().map(entry).collect();
    Ok(Json(json!({ "logs": entries, "logEntries": entries })))
}

#[cfg(test)]
mod tests;
