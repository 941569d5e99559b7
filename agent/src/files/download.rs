//! Downloads of files, in pieces: a piece is read when the one before is in transit.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use hyper::header::{ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Response, StatusCode};
use tokio::sync::mpsc;

use super::{Refusal, Wanted, bad, failed, open_regular, refusal};
use crate::http::{Answer, Reply, Shared, text};

const PIECE: usize = 256 << 10;

/// Whether a client accepts a file uncompressed. Compression would use the guest's processors, and
/// is not supported.
fn takes_identity(headers: &HeaderMap) -> bool {
    let Some(accepted) = text(headers, ACCEPT_ENCODING.as_str()) else { return true };
    let refused = |coding: &str| {
        accepted.split(',').any(|item| {
            let mut parts = item.split(';').map(str::trim);
            let is_it = parts.next().is_some_and(|name| name.eq_ignore_ascii_case(coding));
            let weight = parts.find_map(|part| part.strip_prefix("q="));
            is_it && weight.is_some_and(|weight| weight.parse() == Ok(0.0))
        })
    };
    let is_named = accepted.split(',').any(|item| item.trim().to_ascii_lowercase().starts_with("identity"));
    !refused("identity") && (is_named || !refused("*"))
}

fn open(path: &Path) -> Result<(File, u64, bool), Refusal> {
    let missing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => (StatusCode::NOT_FOUND, format!("path '{}' does not exist", path.display())),
        _ => failed("error reading", path, &error),
    };
    let found = std::fs::metadata(path).map_err(missing)?;
    if found.is_dir() {
        return Err(bad(format_args!("path '{}' is a directory", path.display())));
    }
    if !found.is_file() {
        return Err(bad(format_args!("path '{}' is no regular file", path.display())));
    }
    let file = open_regular(File::options().read(true), path).map_err(missing)?;
    let length = file.metadata().map_err(missing)?.len();
    // Files of /proc and /sys have content but report no length.
    let is_exact = length > 0;
    Ok((file, length, is_exact))
}

/// One piece of a file, and the file.
fn read(mut file: File, most: u64) -> (File, io::Result<Bytes>) {
    let mut piece = Vec::new();
    let most = most.min(PIECE as u64);
    let read = match (&mut file).take(most).read_to_end(&mut piece) {
        // A file of the kernel that has no more for now.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        read => read.map(drop),
    };
    (file, read.map(|()| Bytes::from(piece)))
}

async fn send(mut file: File, length: Option<u64>, sender: mpsc::Sender<io::Result<Bytes>>) {
    let mut left = length.unwrap_or(u64::MAX);
    while left > 0 {
        let most = left;
        let Ok((same, piece)) = tokio::task::spawn_blocking(move || read(file, most)).await else { return };
        file = same;
        let is_end = match &piece {
            Ok(piece) if piece.is_empty() => true,
            Ok(piece) => {
                left -= (piece.len() as u64).min(left);
                false
            }
            Err(_) => true,
        };
        // The file has become shorter: the connection is cut, to report that.
        let piece = if is_end && length.is_some() { Err(io::ErrorKind::UnexpectedEof.into()) } else { piece };
        let is_empty = piece.as_ref().is_ok_and(Bytes::is_empty);
        if is_empty || sender.send(piece).await.is_err() || is_end {
            return;
        }
    }
}

/// `GET /files`.
pub(crate) async fn download(agent: &Shared, head: &Parts) -> Reply {
    let opened = async {
        let wanted = Wanted::of(agent, head, "read")?;
        let path = wanted.resolve(wanted.path.as_deref().unwrap_or_default())?;
        let opened = tokio::task::spawn_blocking(move || open(&path)).await;
        let opened = opened.map_err(|_| (StatusCode::INTERNAL_SERVER_ERROR, "the request has failed".to_owned()))??;
        if !takes_identity(&head.headers) {
            let why = "no acceptable encoding found, supported: [identity]".to_owned();
            return Err((StatusCode::NOT_ACCEPTABLE, why));
        }
        Ok(opened)
    };
    let (file, length, is_exact) = match opened.await {
        Ok(opened) => opened,
        Err(refused) => return refusal(refused),
    };
    let (sender, receiver) = mpsc::channel(1);
    let length = is_exact.then_some(length);
    tokio::spawn(send(file, length, sender));
    let mut reply = Response::new(Answer::Pieces(receiver));
    let headers = reply.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(length) = length {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_taken_unless_it_is_refused() {
        let takes = |value: &str| {
            takes_identity(&[(ACCEPT_ENCODING, HeaderValue::from_str(value).unwrap())].into_iter().collect())
        };
        assert!(takes_identity(&HeaderMap::new()));
        assert!(takes("gzip, deflate") && takes("gzip;q=1.0, *;q=0.5") && takes("identity, *;q=0"));
        assert!(!takes("gzip, identity;q=0") && !takes("gzip, *;q=0.0"));
    }
}
