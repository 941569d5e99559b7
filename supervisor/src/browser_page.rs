//! The page: files that are in the program, and the headers of all answers over TCP.
//!
//! The page holds no secrets, so it needs no token. Its requests to the API need its session.

use std::hash::{DefaultHasher, Hasher};

use axum::Router;
use axum::extract::Request;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use clade_api::http::ApiError;
use clade_api::{ProblemKind, is_for_this_host};

/// The page may only load its own files and ask its own server. No frame, no form, no base, no
/// inline script or style.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const TEXT: &str = "text/plain; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// A file of the page: its path, its type, its content.
type PageFile = (&'static str, &'static str, &'static [u8]);

macro_rules! files {
    ($($path:literal $media:ident $file:literal,)+) => {
        /// The files of the page.
        const FILES: &[PageFile] = &[$(($path, $media, include_bytes!(concat!("../page/", $file))),)+];
    };
}

files! {
    "/" HTML "index.html",
    "/page/page.css" CSS "page.css",
    "/page/icon.svg" SVG "icon.svg",
    "/page/main.js" SCRIPT "main.js",
    "/page/api.js" SCRIPT "api.js",
    "/page/dom.js" SCRIPT "dom.js",
    "/page/tree.js" SCRIPT "tree.js",
    "/page/map.js" SCRIPT "map.js",
    "/page/charts.js" SCRIPT "charts.js",
    "/page/console.js" SCRIPT "console.js",
    "/page/xterm/xterm.mjs" SCRIPT "xterm/xterm.mjs",
    "/page/xterm/addon-fit.mjs" SCRIPT "xterm/addon-fit.mjs",
    "/page/xterm/xterm.css" CSS "xterm/xterm.css",
    "/page/xterm/LICENSE" TEXT "xterm/LICENSE",
    "/page/xterm/LICENSE-addon-fit" TEXT "xterm/LICENSE-addon-fit",
}

/// The routes of the page.
pub(super) fn routes() -> Router {
    FILES.iter().fold(Router::new(), |router, &file| {
        router.route(file.0, get(move |headers: HeaderMap| async move { answer(file, &headers) }))
    })
}

fn answer((_, media, content): PageFile, headers: &HeaderMap) -> Response {
    let mut hasher = DefaultHasher::new();
    hasher.write(content);
    let tag = format!("\"{:016x}\"", hasher.finish());
    let is_known = headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let head = [(CONTENT_TYPE, media.to_owned()), (CACHE_CONTROL, "no-cache".to_owned()), (ETAG, tag)];
    if is_known { (StatusCode::NOT_MODIFIED, head).into_response() } else { (head, content).into_response() }
}

/// Refuses requests for other hosts, and adds the headers that restrict browsers to each answer.
pub(super) async fn harden(request: Request, next: Next) -> Response {
    let mut response = if is_for_this_host(&request) {
        next.run(request).await
    } else {
        ApiError::from(ProblemKind::BadHost).into_response()
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::middleware::from_fn;
    use tower::ServiceExt;

    use super::*;

    fn ask(path: &str, headers: &[(&str, &str)]) -> Response {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let request = headers.iter().fold(Request::get(path), |request, (name, value)| request.header(*name, *value));
        let router = routes().layer(from_fn(harden));
        runtime.block_on(router.oneshot(request.body(Body::empty()).unwrap())).unwrap()
    }

    #[test]
    fn every_file_is_there_under_the_policy_and_known_by_its_tag() {
        for (path, media, content) in FILES {
            let response = ask(path, &[("host", "localhost:7")]);
            assert_eq!(response.status(), StatusCode::OK, "{path}");
            assert_eq!(response.headers()[CONTENT_TYPE], *media, "{path}");
            let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap();
            assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
            assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
            let tag = response.headers()[ETAG].to_str().unwrap().to_owned();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            assert_eq!(runtime.block_on(to_bytes(response.into_body(), 1 << 20)).unwrap(), *content, "{path}");
            let known = ask(path, &[("host", "localhost:7"), ("if-none-match", &tag)]);
            assert_eq!(known.status(), StatusCode::NOT_MODIFIED, "{path}");
        }
    }

    #[test]
    fn no_file_is_for_another_host() {
        for host in ["evil.example", "localhost.evil.example:7"] {
            let response = ask("/", &[("host", host)]);
            assert_eq!(response.status(), StatusCode::FORBIDDEN, "{host}");
            assert!(response.headers().contains_key(CONTENT_SECURITY_POLICY));
        }
        assert_eq!(ask("/", &[]).status(), StatusCode::FORBIDDEN, "no host");
    }

    /// The files refer to nothing outside the program.
    #[test]
    fn files_name_no_other_place() {
        let own = FILES.iter().filter(|(path, ..)| !path.starts_with("/page/xterm/"));
        for (path, _, content) in own {
            let text = std::str::from_utf8(content).unwrap();
            let text = text.replace("http://www.w3.org/2000/svg", "");
            assert!(!text.contains("http:") && !text.contains("https:"), "{path}");
            for unsafe_way in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!text.contains(unsafe_way), "{path}: {unsafe_way}");
            }
        }
    }
}
