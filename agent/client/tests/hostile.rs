//! Guests that refuse, stay silent, flood, and send invalid answers.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use clade_agent_client::proto::api::Generation;
use clade_agent_client::proto::process::{ListResponse, StartRequest};
use clade_agent_client::{Client, ClientError, Endpoint};

/// A guest that runs `behave` for each connection.
fn guest(dir: &tempfile::TempDir, behave: impl Fn(UnixStream) + Send + Sync + Copy + 'static) -> Client {
    let socket = dir.path().join("guest.vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || behave(stream));
        }
    });
    Client::new(Endpoint::Vsock { socket, port: 49983 })
}

/// Reads a line, as the device does.
fn line(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while bytes.last() != Some(&b'\n') && stream.read(&mut byte).unwrap_or(0) == 1 {
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

/// Accepts the connection, reads the head of the request, sends `answer` once, and `more` for ever.
fn say(mut stream: UnixStream, answer: &[u8], more: &[u8]) {
    assert_eq!(line(&mut stream), "CONNECT 49983\n");
    stream.write_all(b"OK 1024\n").unwrap();
    let mut length = 0;
    loop {
        let header = line(&mut stream).to_ascii_lowercase();
        if header.len() <= 2 {
            break;
        }
        length = header.strip_prefix("content-length: ").map_or(length, |value| value.trim().parse().unwrap());
    }
    // Closing a socket with unread bytes is an error to the other end.
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    let mut written = stream.write_all(answer);
    while !more.is_empty() && written.is_ok() {
        written = stream.write_all(more);
    }
    if more.is_empty() && answer.is_empty() {
        thread::sleep(Duration::from_secs(60));
    }
}

fn failure(behave: impl Fn(UnixStream) + Send + Sync + Copy + 'static) -> ClientError {
    let dir = tempfile::tempdir().unwrap();
    let client = guest(&dir, behave);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { client.list().await.unwrap_err() })
}

fn stream_failure(behave: impl Fn(UnixStream) + Send + Sync + Copy + 'static) -> ClientError {
    let dir = tempfile::tempdir().unwrap();
    let client = guest(&dir, behave);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime
        .block_on(async {
            let mut process = client.start(&StartRequest::default(), None).await?;
            while process.next().await?.is_some() {}
            Ok::<_, ClientError>(())
        })
        .unwrap_err()
}

/// Its text is shown on terminals, and kept with the answers of requests.
#[test]
fn a_ready_guests_text_is_short_and_has_no_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    let client = guest(&dir, |stream| {
        let text = format!("\\u001b]52;c;aGk=\\u0007{}", "x".repeat(5_000));
        let many = vec![format!("\"{text}\""); 70].join(",");
        let hooks = vec![format!(r#"{{"name": "{text}", "status": "{text}"}}"#); 70].join(",");
        let body = format!(r#"{{"generation": 7, "hooks": [{hooks}], "failed": [{many}]}}"#);
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
        say(stream, [head, body].concat().as_bytes(), b"");
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ready = runtime.block_on(client.change_generation(&Generation::default())).unwrap();
    assert_eq!((ready.generation, ready.hooks.len(), ready.failed.len()), (7, 64, 64));
    let texts = ready.hooks.iter().flat_map(|hook| [&hook.name, &hook.status]).chain(&ready.failed);
    for text in texts {
        assert!(text.starts_with("]52;c;aGk=xx") && text.len() == 1000, "{text:?}");
    }
}

/// A host asks many guests for it at a time.
#[test]
fn a_guests_load_is_a_short_answer() {
    let dir = tempfile::tempdir().unwrap();
    let client = guest(&dir, |stream| say(stream, b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n", &[b' '; 100]));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refused = runtime.block_on(client.metrics()).unwrap_err().to_string();
    assert!(refused.contains("more than 16384 bytes"), "{refused}");
}

fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn what_is_no_answer_is_an_error_of_bounded_size() {
    let odd_line = failure(|mut stream| {
        line(&mut stream);
        while stream.write_all(b"OK OK OK").is_ok() {}
    });
    assert!(matches!(odd_line, ClientError::Answer { .. }), "{odd_line}");
    let wrong_word = failure(|mut stream| {
        line(&mut stream);
        let _ = stream.write_all(b"NO\n");
    });
    assert!(matches!(wrong_word, ClientError::Answer { .. }), "{wrong_word}");
    let garbage = failure(|stream| say(stream, b"\0\x01garbage\r\n\r\n", b""));
    assert!(matches!(garbage, ClientError::Http(_)), "{garbage}");
    let endless_head =
        failure(|stream| say(stream, b"HTTP/1.1 200 OK\r\n", b"A: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\n"));
    assert!(matches!(endless_head, ClientError::Http(_)), "{endless_head}");
    let endless_body = failure(|stream| say(stream, b"HTTP/1.1 200 OK\r\n\r\n", &[b' '; 4096]));
    assert!(matches!(endless_body, ClientError::Answer { .. }), "{endless_body}");
    let no_json = failure(|stream| say(stream, b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b""));
    assert!(matches!(no_json, ClientError::Answer { .. }), "{no_json}");
    let cut = failure(|stream| say(stream, b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{", b""));
    assert!(matches!(cut, ClientError::Lost(_)), "{cut}");
    let no_answer = failure(|mut stream| {
        line(&mut stream);
        stream.write_all(b"OK 7\n").unwrap();
        while line(&mut stream).len() > 2 {}
    });
    assert!(matches!(no_answer, ClientError::Lost(_)), "{no_answer}");
    let long_reason = failure(|stream| say(stream, b"HTTP/1.1 500 No\r\n\r\n", &[b'x'; 4096]));
    assert!(long_reason.to_string().len() < 2000, "{long_reason}");
    let long_refusal = failure(|stream| {
        let message = format!("a\\u001b[2Jb\\n{}", "c".repeat(1 << 20));
        let body = format!(r#"{{"code":"internal","message":"{message}"}}"#);
        say(stream, format!("HTTP/1.1 500 No\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes(), b"");
    });
    let shown = long_refusal.to_string();
    assert!(matches!(long_refusal, ClientError::Rpc(_)) && shown.len() < 2000, "{shown}");
    assert!(shown.contains("a[2Jb\nccc") && !shown.contains('\u{1b}'), "{shown:?}");
    assert!(memory() < 128 << 10, "{} KiB", memory());
}

#[test]
fn a_port_refused_before_it_is_asked_for_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("guest.vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!(line(&mut stream), "CONNECT 49984\n");
        // From here on the client's writes fail.
        stream.shutdown(Shutdown::Read).unwrap();
        stream.write_all(b"OK 7\nERR 512 connections to ports are open\n").unwrap();
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let endpoint = Endpoint::Vsock { socket, port: 49984 };
    let refused = runtime.block_on(endpoint.connect_tcp(80, Duration::from_secs(60))).unwrap_err();
    assert!(matches!(&refused, ClientError::PortRefused { port: 80, why } if why.starts_with("512")), "{refused}");
}

#[test]
fn broken_streams_are_told_apart() {
    const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: application/connect+json\r\n\r\n";
    let long = stream_failure(|stream| say(stream, &[HEAD, b"\0\xff\xff\xff\xff"].concat(), &[b'x'; 4096]));
    assert!(matches!(long, ClientError::Envelope(_)), "{long}");
    let early = stream_failure(|stream| say(stream, &[HEAD, b"\0\0\0"].concat(), b""));
    assert!(matches!(early, ClientError::Truncated), "{early}");
    let ended = stream_failure(|stream| say(stream, &[HEAD, b"\x02\0\0\0\x02{}"].concat(), b""));
    assert!(matches!(ended, ClientError::Answer { .. }), "{ended}");
    let refusal = br#"{"error":{"code":"not_found","message":"n\u001bo"}}"#;
    let refused = stream_failure(move |stream| {
        say(stream, &[HEAD, &[2, 0, 0, 0, refusal.len() as u8], &refusal[..]].concat(), b"");
    });
    assert!(matches!(&refused, ClientError::Rpc(rpc) if rpc.message == "no"), "{refused}");
}

#[test]
fn an_answer_in_pieces_is_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let client = guest(&dir, |mut stream| {
        line(&mut stream);
        for byte in b"OK 7\n" {
            stream.write_all(&[*byte]).unwrap();
        }
        while line(&mut stream).len() > 2 {}
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 34\r\n\r\n{\"processes\":[{\"pid\":7,\"new\":{}}]}" {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let list: ListResponse = runtime.block_on(async { client.list().await.unwrap() });
    assert_eq!(list.processes[0].pid, 7);
}
