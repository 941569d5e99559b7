//! The kind of each page of a VM, in few bytes: `GET /v1/vms/{name}/page-map`.
//!
//! | query | value |
//! |---|---|
//! | `from=GFN` | the first guest frame; 0 if not given |
//! | `max_runs=N` | most runs; 1,048,576 if not given |
//!
//! The answer is the four bytes `CPM1` and then numbers in LEB128, without signs:
//!
//! | numbers | content |
//! |---|---|
//! | 1 | the first frame of the next request; 0 if this is all |
//! | 1 and as many | the layers, by number |
//! | 1 | the runs |
//! | 3 a run | frames without memory before it; frames in it; their kind |
//!
//! Kinds of pages: 0 absent, 1 reference, 2 exclusive, 3 pinned, 4 and more: of the first layer,
//! the second and so on. A guest of 16 GiB that shares all pages takes some bytes. At worst, when
//! the kind changes at each page, a page takes three.
//!
//! The answer has an `ETag`. A request with that as `If-None-Match` is answered with 304 while
//! nothing has changed.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path as UrlPath, RawQuery};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::pages::{MAPS, MAX_FROM};
use super::query::{self, QueryError, within};
use crate::rpc::with_vm_host;
use crate::vm_host::WeakVmHost;
use clade_api::MEDIA_TYPE;
use clade_api::http::ApiError;
use clade_memory::{PageKind, PageMap};

/// Most runs of an answer.
const MAX_RUNS: u64 = 1 << 20;
/// The first bytes of an answer.
const MAGIC: &[u8; 4] = b"CPM1";
/// The number of the first layer's pages.
const FIRST_LAYER: u64 = 4;

/// Parses the first frame and the most runs.
fn parse(text: &str) -> Result<(u64, usize), QueryError> {
    let [from, most] = query::parse_numbers(text, ["from", "max_runs"])?;
    let from = within("from", from.unwrap_or(0), 0..=MAX_FROM)?;
    let most = within("max_runs", most.unwrap_or(MAX_RUNS), 1..=MAX_RUNS)?;
    Ok((from, most as usize))
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Encodes at most `most` runs from the guest frame `from` on.
fn encode(map: &PageMap, from: u64, most: usize) -> Vec<u8> {
    let first = map.runs.partition_point(|run| run.first + run.count <= from);
    let rest = &map.runs[first..];
    let runs = &rest[..rest.len().min(most)];
    let (mut layers, mut numbers) = (BTreeMap::new(), Vec::new());
    for run in runs {
        if let PageKind::Shared(layer) = run.kind {
            layers.entry(layer.number()).or_insert_with(|| {
                numbers.push(layer.number());
                FIRST_LAYER + numbers.len() as u64 - 1
            });
        }
    }
    let mut bytes = Vec::with_capacity(16 + 4 * runs.len());
    bytes.extend_from_slice(MAGIC);
    put(&mut bytes, rest.get(most).map_or(0, |run| run.first));
    put(&mut bytes, numbers.len() as u64);
    numbers.into_iter().for_each(|number| put(&mut bytes, number));
    put(&mut bytes, runs.len() as u64);
    let mut at = from;
    for run in runs {
        let begin = run.first.max(from);
        let end = run.first + run.count;
        put(&mut bytes, begin - at);
        put(&mut bytes, end - begin);
        put(
            &mut bytes,
            match run.kind {
                PageKind::Absent => 0,
                PageKind::Reference => 1,
                PageKind::Exclusive => 2,
                PageKind::Pinned => 3,
                PageKind::Shared(layer) => layers[&layer.number()],
            },
        );
        at = end;
    }
    bytes
}

/// Shows the kind of each page of a VM's memory, as runs in a few bytes each: for a browser's page
/// that draws them. `docs/page.md` has the format.
#[utoipa::path(
    get,
    path = "/v1/vms/{name}/page-map",
    params(
        ("from" = Option<u64>, Query, description = "The first guest frame number.", minimum = 0, maximum = 2147483647),
        ("max_runs" = Option<u64>, Query, description = "Most runs.", minimum = 1, maximum = 1048576),
    ),
    responses((status = 200, description = "The runs.", body = String, content_type = "application/octet-stream"))
)]
pub(super) async fn page_map(
    Extension(vm_host): Extension<WeakVmHost>,
    UrlPath(name): UrlPath<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (from, most) = parse(query.as_deref().unwrap_or_default())?;
    // The semaphore is never closed.
    let _turn = MAPS.acquire().await;
    let bytes =
        with_vm_host(vm_host, move |vm_host| Ok(encode(&vm_host.get(&name)?.vm.page_map()?, from, most))).await?;
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    let tag = format!("\"{:016x}\"", hasher.finish());
    let is_known = headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut response = if is_known {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(CONTENT_TYPE, MEDIA_TYPE)], Body::from(bytes)).into_response()
    };
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Hexadecimal digits and quotes.
    response.headers_mut().extend(HeaderValue::from_str(&tag).map(|tag| (ETAG, tag)));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use clade_memory::PageRun;

    use super::*;

    /// Reads numbers until the bytes end.
    fn numbers(bytes: &[u8]) -> Vec<u64> {
        let (mut all, mut number, mut shift) = (Vec::new(), 0, 0);
        for byte in bytes {
            number |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                all.push(number);
                (number, shift) = (0, 0);
            }
        }
        assert_eq!(shift, 0, "it ends within a number");
        all
    }

    fn map() -> PageMap {
        let run = |first, count, kind| PageRun { first, count, kind };
        let runs = vec![
            run(0, 1000, PageKind::Exclusive),
            run(1000, 5, PageKind::Reference),
            run(1005, 1, PageKind::Pinned),
            run(1 << 20, 1 << 22, PageKind::Absent),
        ];
        PageMap { runs, layers: Vec::new() }
    }

    #[test]
    fn runs_take_few_bytes_and_say_all() {
        let bytes = encode(&map(), 0, 100);
        assert_eq!(&bytes[..4], MAGIC);
        let gap = (1 << 20) - 1006;
        assert_eq!(numbers(&bytes[4..]), [0, 0, 4, 0, 1000, 2, 0, 5, 1, 0, 1, 3, gap, 1 << 22, 0]);
        assert!(bytes.len() < 32, "{}", bytes.len());
    }

    #[test]
    fn parts_are_the_whole() {
        let whole = numbers(&encode(&map(), 0, 100)[4..])[3..].to_vec();
        for most in 1..5 {
            let (mut from, mut all, mut at) = (0, Vec::new(), 0);
            loop {
                let part = numbers(&encode(&map(), from, most)[4..]);
                for run in part[3..].chunks(3) {
                    let first = from + run[0];
                    all.extend([first - at, run[1], run[2]]);
                    (at, from) = (first + run[1], first + run[1]);
                }
                from = part[0];
                if from == 0 {
                    break;
                }
            }
            assert_eq!(all, whole, "{most}");
        }
        // In the middle of a run, and behind all runs.
        assert_eq!(numbers(&encode(&map(), 990, 1)[4..]), [1000, 0, 1, 0, 10, 2]);
        assert_eq!(numbers(&encode(&map(), 1 << 30, 1)[4..]), [0, 0, 0]);
    }

    #[test]
    fn a_query_is_numbers_within_bounds() {
        assert_eq!(parse(""), Ok((0, MAX_RUNS as usize)));
        assert_eq!(parse("from=7&max_runs=3"), Ok((7, 3)));
        for (text, named) in [
            ("from=-1", "\"-1\""),
            ("from=2147483648", "2147483648"),
            ("max_runs=0", "max_runs=0"),
            ("max_runs=1048577", "1048577"),
            ("cells=3", "\"cells\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
