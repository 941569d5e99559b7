//! A guest's memory: `GET` and `PUT /v1/vms/{name}/memory`, bytes as they are.
//!
//! | query | value |
//! |---|---|
//! | `address=N` | guest-physical address of the first byte |
//! | `length=N` | number of bytes to read |
//! | `doorbell=N` | the vCPU to interrupt after a write |

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody, to_bytes};
use axum::extract::{Path as UrlPath, RawQuery};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use hyper::body::{Frame, SizeHint};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::query::{self, QueryError, within};
use crate::rpc::with_vm_host;
use crate::vm_host::WeakVmHost;
use clade_api::http::{Answer, ApiError, holding};
use clade_api::{MAX_MEMORY, MEDIA_TYPE, MemoryWritten, ProblemKind};

/// Answers with memory that the process holds at a time, until their clients have read them.
static READS: Semaphore = Semaphore::const_new(8);
/// Time limit of a request's wait for its turn.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes handed to the connection at a time.
const CHUNK: usize = 64 << 10;

/// The parameters of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Query {
    address: u64,
    length: Option<u64>,
    doorbell: Option<u64>,
}

fn parse(text: &str) -> Result<Query, QueryError> {
    let [address, length, doorbell] = query::parse_numbers(text, ["address", "length", "doorbell"])?;
    Ok(Query { address: address.ok_or(QueryError::Missing { key: "address" })?, length, doorbell })
}

/// Bytes sent to a client, in pieces.
struct Pieces(Bytes);

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let length = self.0.len().min(CHUNK);
        Poll::Ready((length > 0).then(|| Ok(Frame::data(self.0.split_to(length)))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

/// Returns the body of an answer, which holds its turn until the last byte is sent.
fn turned(bytes: Bytes, turn: SemaphorePermit<'static>) -> Body {
    holding(Body::new(Pieces(bytes)), turn)
}

/// Reads a guest's memory, as the guest sees it. A fork, a reset or a pause comes before or after
/// the whole read. Aligned words of 8 bytes are read as a whole; other words may be torn by writes
/// of vCPUs.
#[utoipa::path(
    get,
    operation_id = "read_memory",
    path = "/v1/vms/{name}/memory",
    params(
        ("address" = u64, Query, description = "Guest-physical address of the first byte.", minimum = 0),
        ("length" = u64, Query, description = "How many bytes.", minimum = 1, maximum = 4194304),
    ),
    responses((status = 200, description = "The bytes.", body = String, content_type = "application/octet-stream"))
)]
pub(super) async fn read(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let Query { address, length, doorbell } = parse(query.as_deref().unwrap_or_default())?;
    if doorbell.is_some() {
        return Err(QueryError::NotHere { key: "doorbell", reason: "for writing" }.into());
    }
    let length = length.ok_or(QueryError::Missing { key: "length" })?;
    let value = within("length", length, 1..=MAX_MEMORY as u64)?;
    let turn = timeout(TURN_TIMEOUT, READS.acquire()).await.ok().and_then(Result::ok).ok_or(ProblemKind::TooMany)?;
    let bytes = with_vm_host(vm_host, move |vm_host| {
        let mut bytes = vec![0; value as usize];
        vm_host.get(&name)?.vm.read_memory(address, &mut bytes)?;
        Ok(bytes)
    });
    let body = turned(bytes.await?.into(), turn);
    Ok(([(CONTENT_TYPE, MEDIA_TYPE), (CACHE_CONTROL, "no-store")], body).into_response())
}

/// Writes a guest's memory, as the guest would. A fork, a snapshot or a reset has all of it or
/// nothing. Aligned words of 8 bytes are written as a whole. With `doorbell`, the vCPU of that
/// number is interrupted afterwards (vector 48), if its guest has enabled its local APIC: a guest
/// that takes orders from its memory can halt in between.
#[utoipa::path(
    put,
    operation_id = "write_memory",
    path = "/v1/vms/{name}/memory",
    params(
        ("address" = u64, Query, description = "Guest-physical address of the first byte.", minimum = 0),
        ("doorbell" = Option<u64>, Query, description = "The number of a vCPU that is interrupted after the write.", minimum = 0),
    ),
    request_body(content = String, content_type = "application/octet-stream", description = "1 to 4,194,304 bytes."),
    responses((status = 200, description = "Done.", body = MemoryWritten))
)]
pub(super) async fn write(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Answer<MemoryWritten> {
    let media = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    if media.is_some_and(|media| !media.eq_ignore_ascii_case(MEDIA_TYPE.as_bytes())) {
        return Err(ApiError::new(ProblemKind::MediaType, format!("the body is not declared as {MEDIA_TYPE}")));
    }
    let Query { address, length, doorbell } = parse(query.as_deref().unwrap_or_default())?;
    if length.is_some() {
        let reason = "for reading: a write is as long as its body";
        return Err(QueryError::NotHere { key: "length", reason }.into());
    }
    // The body is already there, and bounded by its reader.
    let unread = |error| ApiError::new(ProblemKind::BadRequest, format!("the body cannot be read: {error}"));
    let body = to_bytes(body, MAX_MEMORY).await.map_err(unread)?;
    let written = with_vm_host(vm_host, move |vm_host| {
        let vm = &vm_host.get(&name)?.vm;
        // Before the write: a refused request has changed nothing.
        doorbell.map_or(Ok(()), |vcpu| vm.expect_vcpu(vcpu).map(drop))?;
        vm.write_memory(address, &body)?;
        doorbell.map_or(Ok(()), |vcpu| vm.ring_doorbell(vcpu))?;
        Ok(MemoryWritten { address, length: body.len() as u64 })
    });
    Ok(Json(written.await?))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[test]
    fn a_query_is_an_address_and_a_length() {
        let query = |address, length, doorbell| Ok(Query { address, length, doorbell });
        assert_eq!(parse("address=4096&length=8"), query(4096, Some(8), None));
        assert_eq!(parse("address=18446744073709551615"), query(u64::MAX, None, None));
        assert_eq!(parse("doorbell=1&address=0"), query(0, None, Some(1)));
        for (text, named) in [
            ("", "address is missing"),
            ("length=8", "address is missing"),
            ("address=0x10", "\"0x10\""),
            ("address=-1", "\"-1\""),
            ("address=1&lenght=3", "\"lenght\""),
            ("address=1&length=", "length=\"\""),
            ("address=1&doorbell=x", "doorbell=\"x\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn an_answer_holds_its_turn_until_it_is_sent() {
        static TURNS: Semaphore = Semaphore::const_new(1);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let bytes: Vec<u8> = (0..CHUNK + 7).map(|at| at as u8).collect();
            let mut body = turned(bytes.clone().into(), TURNS.acquire().await.unwrap());
            assert_eq!(body.size_hint().exact(), Some(bytes.len() as u64));
            let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!((first.len(), TURNS.available_permits()), (CHUNK, 0));
            let rest = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert!([&first[..], &rest[..]].concat() == bytes && body.frame().await.is_none());
            drop(body);
            assert_eq!(TURNS.available_permits(), 1);
        });
    }

    /// The document's numbers are literals, as the macro requires.
    #[test]
    fn the_document_has_the_bounds_of_the_code() {
        assert_eq!(MAX_MEMORY, 4_194_304);
    }
}
