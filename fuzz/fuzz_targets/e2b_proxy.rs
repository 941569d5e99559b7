//! Any bytes of a client at E2B's address, in any pieces: each connection of the guest gets one
//! request with an unambiguous end, without the tokens of the agent or the host's API. The answer
//! is HTTP.
#![no_main]

use std::cell::RefCell;
use std::time::Duration;

use clade_e2b::Gateway;
use clade_e2b::fuzzing::{answer, gateway};
use libfuzzer_sys::{arbitrary, fuzz_target};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};

/// Texts that no program may receive; its agent receives the second.
const SECRETS: [&str; 6] = [
    "x-api-key",
    "x-access-token",
    "e2b-traffic-access-token",
    "e2b-sandbox-id",
    "e2b-sandbox-port",
    "proxy-authorization",
];
const AGENTS_OWN: &str = "x-access-token";
const AGENT: &str = "CONNECT 49983\n";
const PORTS: &str = "CONNECT 49984\n";
const METHODS: [&str; 6] = ["GET", "POST", "HEAD", "PUT", "OPTIONS", "CONNECT"];
const PATHS: [&str; 8] =
    ["/", "/ws?a=b", "/init", "/clade/x", "//init", "http://80-ibox.box.test/init", "*", "http://x"];
const LINES: [&str; 24] = [
    "host: 80-ibox.box.test",
    "host: 49983-ibox.box.test:3000",
    "Host: api.box.test",
    "host: 443-other.box.test",
    "e2b-sandbox-id: ibox",
    "E2b-Sandbox-Port: 80",
    "x-api-key: s",
    "X-Access-Token: s",
    "e2b-traffic-access-token: s",
    "connection: upgrade",
    "connection: close, x-mine, x-access-token",
    "x-mine: s",
    "upgrade: websocket",
    "upgrade: h2c",
    "sec-websocket-key: k",
    "content-length: 3",
    "content-length: 30",
    "Content-Length: 3, 3",
    "transfer-encoding: chunked",
    "Transfer-Encoding: identity, chunked",
    "transfer-encoding : chunked",
    "te: trailers",
    "trailer: x-access-token",
    "expect: 100-continue",
];
const BODIES: [&str; 6] =
    ["abc", "3\r\nabc\r\n0\r\n\r\n", "0\r\nx-access-token: s\r\n\r\n", "3;a=b\r\nabc\r\n", "0\r\n\r\n", ""];

#[derive(arbitrary::Arbitrary, Debug)]
enum Piece {
    Head(u8, u8, Vec<u8>),
    Line(u8),
    Bytes(Vec<u8>),
    Body(u8),
    /// A pause before the next piece.
    Wait,
}

/// Behaviour of a guest.
#[derive(arbitrary::Arbitrary, Clone, Copy, Debug)]
enum Guest {
    Plain,
    Upgrades,
    Rude,
}

fn pieces(pieces: &[Piece]) -> Vec<Vec<u8>> {
    let mut all = vec![Vec::new()];
    for piece in pieces {
        let last = all.last_mut().expect("one");
        match piece {
            Piece::Head(method, path, lines) => {
                let (method, path) = (METHODS[usize::from(method % 6)], PATHS[usize::from(path % 8)]);
                last.extend(format!("{method} {path} HTTP/1.1\r\n").bytes());
                for line in lines.iter().take(12) {
                    last.extend(format!("{}\r\n", LINES[usize::from(*line) % LINES.len()]).bytes());
                }
                last.extend(b"\r\n");
            }
            Piece::Line(line) => last.extend(format!("{}\r\n", LINES[usize::from(*line) % LINES.len()]).bytes()),
            Piece::Bytes(bytes) => last.extend(bytes),
            Piece::Body(body) => last.extend(BODIES[usize::from(*body) % BODIES.len()].bytes()),
            Piece::Wait => all.push(Vec::new()),
        }
    }
    all
}

async fn line(from: &mut BufReader<UnixStream>) -> Option<String> {
    let mut line = String::new();
    from.read_line(&mut line).await.ok()?;
    line.ends_with('\n').then_some(line)
}

/// Returns the length of a whole chunked body. Any other body is not forwarded.
fn chunks(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let end = at + bytes[at..].windows(2).position(|two| two == b"\r\n")?;
        let size = std::str::from_utf8(&bytes[at..end]).expect("a size");
        let size = usize::from_str_radix(size, 16).expect("a size and nothing else");
        if size == 0 {
            // Trailers would be unchecked headers.
            let rest = bytes.get(end + 2..end + 4)?;
            assert_eq!(rest, b"\r\n", "trailers");
            return Some(end + 4);
        }
        at = end + 2 + size + 2;
        assert_eq!(bytes.get(at - 2..at)?, b"\r\n");
    }
}

/// Checks all bytes that one connection of the guest received.
fn check(is_agent: bool, upgraded: bool, bytes: &[u8]) {
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut headers);
    let Ok(httparse::Status::Complete(at)) = request.parse(bytes) else {
        panic!("no head: {:?}", String::from_utf8_lossy(bytes))
    };
    let all = |name: &str| request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case(name)).count();
    for secret in SECRETS.iter().filter(|secret| !(is_agent && **secret == AGENTS_OWN)) {
        assert_eq!(all(secret), 0, "{secret} is passed on");
    }
    let path = request.path.expect("a path");
    assert!(path.starts_with('/') || path == "*", "{path:?}");
    assert!(!is_agent || !(path == "/init" || path.starts_with("/clade")), "{path:?} is for the host");
    assert!(all("host") <= 1 && all("content-length") + all("transfer-encoding") <= 1, "{:?}", request.headers);
    let asks = all("upgrade") > 0;
    assert!(!asks || (!is_agent && request.method == Some("GET") && all("upgrade") == 1 && all("connection") == 1));
    assert!(!upgraded || asks);
    let body = &bytes[at..];
    if upgraded {
        return;
    }
    let value = |name: &str| {
        let header = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(std::str::from_utf8(header.value).expect("text"))
    };
    if let Some(length) = value("content-length") {
        assert!(body.len() <= length.parse().expect("a length"), "more than its length");
    } else if let Some(coding) = value("transfer-encoding") {
        assert_eq!(coding, "chunked");
        assert!(chunks(body).is_none_or(|len| len == body.len()), "something behind its end");
    } else {
        assert!(body.is_empty(), "a body without a length");
    }
}

/// Accepts one connection for the agent, and checks its bytes.
async fn guest(stream: UnixStream, kind: Guest) {
    let mut stream = BufReader::new(stream);
    let connect = line(&mut stream).await.expect("a port");
    let is_agent = connect == AGENT;
    assert!(is_agent || connect == PORTS, "{connect:?}");
    let _ = stream.write_all(b"OK 7\n").await;
    if !is_agent {
        let port = line(&mut stream).await.expect("a TCP port");
        assert!(port == "TCP 80\n" || port == "TCP 443\n", "{port:?}");
        let _ = stream.write_all(b"OK\n").await;
    }
    let (mut bytes, mut upgraded) = (Vec::new(), false);
    while !bytes.windows(4).any(|four| four == b"\r\n\r\n") {
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            // The client has gone.
            return;
        }
    }
    let asks = String::from_utf8_lossy(&bytes).to_ascii_lowercase().contains("upgrade: websocket");
    let said: &[u8] = match kind {
        Guest::Plain => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-access-token: t\r\n\r\nok",
        Guest::Upgrades => {
            upgraded = asks;
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
              sec-websocket-accept: a\r\n\r\nhello"
        }
        Guest::Rude => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
    };
    let _ = stream.write_all(said).await;
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut bytes)).await;
    check(is_agent, upgraded, &bytes);
}

struct Host {
    runtime: Runtime,
    gateway: Gateway,
    listener: UnixListener,
    _dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        // The clock is the target's: a wait times out at once.
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("vsock");
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(&socket).expect("a socket")
        };
        let gateway = gateway(dir.path(), &socket);
        Self { runtime, gateway, listener, _dir: dir }
    }
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::new(Host::new());
}

async fn talk(host: &Host, sent: Vec<Vec<u8>>, kind: Guest) {
    let (client, server) = tokio::io::duplex(1 << 16);
    let (mut from_server, mut to_server) = tokio::io::split(client);
    let write = async {
        for piece in sent {
            let _ = to_server.write_all(&piece).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let _ = to_server.shutdown().await;
    };
    let read = async {
        let mut bytes = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(60), from_server.read_to_end(&mut bytes)).await;
        bytes
    };
    let guests = async {
        let mut guests = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                Ok((stream, _)) = host.listener.accept() => drop(guests.spawn(guest(stream, kind))),
                Some(done) = guests.join_next() => done.expect("the guest is sent what is wrong"),
            }
        }
    };
    let client = async {
        let ((), bytes, ()) = tokio::join!(write, read, answer(&host.gateway, server));
        assert!(bytes.is_empty() || bytes.starts_with(b"HTTP/1."), "{:?}", String::from_utf8_lossy(&bytes));
        // The guest's remaining bytes.
        tokio::time::sleep(Duration::from_secs(10)).await;
    };
    tokio::select! {
        () = client => {}
        () = guests => {}
    }
}

fuzz_target!(|input: (Guest, Vec<Piece>)| {
    let (kind, all) = input;
    HOST.with_borrow(|host| host.runtime.block_on(talk(host, pieces(&all), kind)));
});
