//! A VM's consoles over HTTP: `GET` and `POST /v1/vms/{name}/console`.
//!
//! | query | value |
//! |---|---|
//! | `line=serial`, `line=virtio` | which console; the serial one if not given |
//!
//! Output is a body without end. Input comes in separate requests: a browser's page needs nothing
//! but `fetch`, and each request is checked like any other.

use std::sync::{Arc, Weak};

use axum::body::{Body, Bytes};
use axum::extract::{Path as UrlPath, RawQuery};
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use tokio::sync::{Semaphore, mpsc};

use super::query::{self, QueryError};
use crate::console::{Line, MAX_CONNECTIONS, follow, type_in};
use crate::rpc::with_vm_host;
use crate::vm_host::WeakVmHost;
use clade_api::http::{Answer, ApiError, Frames};
use clade_api::{ConsoleTyped, MEDIA_TYPE, ProblemKind};

/// Clients that follow consoles of the process.
static FOLLOWERS: Semaphore = Semaphore::const_new(MAX_CONNECTIONS);

fn parse(text: &str) -> Result<Line, QueryError> {
    let [line] = query::parse(text, ["line"], |key, value| match value {
        "serial" => Ok(Line::Serial),
        "virtio" => Ok(Line::Virtio),
        _ => Err(QueryError::NotAChoice { key, value: value.to_owned(), choices: "serial or virtio" }),
    })?;
    Ok(line.unwrap_or(Line::Serial))
}

fn no_such_line(name: &str) -> ApiError {
    ApiError::new(ProblemKind::NoDevice, format!("{name:?} has no virtio console"))
}

/// Follows a VM's console: sends its last output, and then further output until the VM ends. Output
/// that a slow client has no room for is dropped, and replaced by a line with the number of bytes.
#[utoipa::path(
    get,
    operation_id = "follow_console",
    path = "/v1/vms/{name}/console",
    params(("line" = Option<String>, Query, description = "`serial` or `virtio`.", pattern = "^(serial|virtio)$")),
    responses((status = 200, description = "Output, without end.", body = String, content_type = "application/octet-stream"))
)]
pub(super) async fn show(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let line = parse(query.as_deref().unwrap_or_default())?;
    let too_many = |_| {
        let text = format!("{MAX_CONNECTIONS} clients follow the consoles of this VM's process");
        ApiError::new(ProblemKind::TooMany, text)
    };
    let permit = FOLLOWERS.try_acquire().map_err(too_many)?;
    let named = name.clone();
    let reader = with_vm_host(vm_host, move |vm_host| Ok(follow(&vm_host.get(&named)?.vm, line))).await?;
    let reader = reader.ok_or_else(|| no_such_line(&name))?;
    let (to, frames) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let bytes = tokio::select! {
                bytes = reader.next() => bytes,
                () = to.closed() => None,
            };
            let Some(bytes) = bytes else { break };
            if to.send(Bytes::from(bytes)).await.is_err() {
                break;
            }
        }
        drop(permit);
    });
    Ok(([(CONTENT_TYPE, MEDIA_TYPE), (CACHE_CONTROL, "no-store")], Body::new(Frames(frames))).into_response())
}

/// Types into a VM's console. A suspended VM wakes.
#[utoipa::path(
    post,
    operation_id = "type_into_console",
    path = "/v1/vms/{name}/console",
    params(("line" = Option<String>, Query, description = "`serial` or `virtio`.", pattern = "^(serial|virtio)$")),
    request_body(content = String, content_type = "application/octet-stream", description = "At most 65,536 bytes."),
    responses((status = 200, description = "Done.", body = ConsoleTyped))
)]
pub(super) async fn write(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    bytes: Bytes,
) -> Answer<ConsoleTyped> {
    let line = parse(query.as_deref().unwrap_or_default())?;
    if headers.get(CONTENT_TYPE).is_none_or(|media| media.as_bytes() != MEDIA_TYPE.as_bytes()) {
        return Err(ApiError::new(ProblemKind::MediaType, format!("what is typed is sent as {MEDIA_TYPE}")));
    }
    let named = name.clone();
    let vm: Weak<_> = with_vm_host(vm_host, move |vm_host| Ok(Arc::downgrade(&vm_host.get(&named)?.vm))).await?;
    match type_in(&vm, line, &bytes).await {
        Some(taken) => Ok(Json(ConsoleTyped { taken: taken.ok_or_else(|| no_such_line(&name))? })),
        None => Err(ProblemKind::VmGone.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_of_two() {
        assert_eq!((parse(""), parse("line=virtio")), (Ok(Line::Serial), Ok(Line::Virtio)));
        for (text, named) in [
            ("line=tty", "\"tty\""),
            ("line", "\"\""),
            ("line=tty&line=serial", "\"tty\""),
            ("lines=serial", "\"lines\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
