//! Any bytes before a connection to a guest's port: the first line, what follows it, the port that
//! it names, and answers.
#![no_main]

use std::io;

use clade_agent::fuzzing::first_line;
use clade_agent_proto::forward::{MAX_REPLY, MAX_REQUEST, Reply, parse_request, request};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, Chain};
use tokio::runtime::Builder;

/// A stream that comes in two pieces, and ends.
fn stream(bytes: &[u8], cut: usize) -> Chain<&[u8], &[u8]> {
    let (first, rest) = bytes.split_at(cut.min(bytes.len()));
    first.chain(rest)
}

/// Reads the first line, and the rest behind it.
fn read(bytes: &[u8], cut: usize) -> (io::Result<Vec<u8>>, Vec<u8>) {
    let runtime = Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (mut stream, mut rest) = (stream(bytes, cut), Vec::new());
        let line = first_line(&mut stream).await;
        stream.read_to_end(&mut rest).await.expect("what is left");
        (line, rest)
    })
}

/// The only line that names a port.
fn names(line: &[u8]) -> Option<u16> {
    let port = std::str::from_utf8(line).ok()?.split_once(' ')?.1.parse().ok().filter(|port| *port != 0)?;
    (request(port).trim_end_matches('\n').as_bytes() == line).then_some(port)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    let (line, rest) = read(bytes, usize::from(cut));
    match bytes.iter().take(MAX_REQUEST + 1).position(|byte| *byte == b'\n') {
        Some(end) => {
            assert_eq!(line.expect("it ends"), bytes[..end]);
            assert_eq!(rest, bytes[end + 1..], "what follows is the port's");
        }
        None => {
            let error = line.expect_err("it does not end").kind();
            let is_long = bytes.len() > MAX_REQUEST;
            assert_eq!(error, if is_long { io::ErrorKind::InvalidData } else { io::ErrorKind::UnexpectedEof });
        }
    }
    assert_eq!(parse_request(bytes), names(bytes));
    let text = String::from_utf8_lossy(bytes).into_owned();
    for reply in [Reply::Closed(text.clone()), Reply::Refused(text)] {
        let line = reply.line();
        assert!(line.len() <= MAX_REPLY && line.ends_with('\n') && line.matches('\n').count() == 1, "{line:?}");
        let again = Reply::parse(line.trim_end_matches('\n').as_bytes()).expect("its own line");
        assert_eq!(again.line(), line);
    }
    if let Some(reply) = Reply::parse(bytes) {
        assert_eq!(reply.line().trim_end_matches('\n').as_bytes(), bytes);
    }
});
