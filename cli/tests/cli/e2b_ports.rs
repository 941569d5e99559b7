//! TCP ports of E2B's sandboxes: HTTP and WebSockets of a Python in a guest.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use clade_test_support::PatientStream;
use serde_json::Value;

use crate::cached;
use crate::e2b::Host;
use crate::tool::{kvm, wait_until};

/// Requests for one port of one sandbox.
struct Port<'a> {
    host: &'a Host,
    /// The part of a head that names them.
    named: String,
}

impl Port<'_> {
    fn by_headers<'a>(host: &'a Host, id: &str, port: u16) -> Port<'a> {
        Port { host, named: format!("host: x\r\ne2b-sandbox-id: {id}\r\ne2b-sandbox-port: {port}\r\n") }
    }

    fn by_host<'a>(host: &'a Host, id: &str, port: u16) -> Port<'a> {
        Port { host, named: format!("host: {port}-{id}.box.test\r\n") }
    }

    fn open(&self, first: &str, more: &str) -> BufReader<PatientStream<TcpStream>> {
        let mut stream = PatientStream::from(TcpStream::connect(&self.host.address).unwrap());
        stream.write_all(format!("{first} HTTP/1.1\r\n{}{more}\r\n", self.named).as_bytes()).unwrap();
        BufReader::new(stream)
    }

    fn says(&self, first: &str, more: &str, body: &str) -> (u16, String) {
        let more = format!("connection: close\r\ncontent-length: {}\r\n{more}", body.len());
        let mut stream = self.open(first, &more);
        stream.get_mut().write_all(body.as_bytes()).unwrap();
        let (status, _) = head(&mut stream);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        (status, answer)
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.says(&format!("GET {path}"), "", "")
    }

    fn websocket(&self, more: &str) -> BufReader<PatientStream<TcpStream>> {
        let ask = "connection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        let mut stream = self.open("GET /ws", &format!("{ask}{more}"));
        let (status, head) = head(&mut stream);
        assert_eq!(status, 101, "{head}");
        // The example of RFC 6455.
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        stream
    }
}

fn head(stream: &mut impl BufRead) -> (u16, String) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(stream.read_line(&mut head).unwrap(), 0, "the head ends early: {head:?}");
    }
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head)
}

/// Sends a message of less than 64 KiB, and expects it back.
fn echo(stream: &mut BufReader<PatientStream<TcpStream>>, text: &str) {
    let length = text.len();
    let lengths: Vec<u8> = match u8::try_from(length) {
        Ok(short @ ..=125) => vec![short],
        _ => [&[126], &u16::try_from(length).unwrap().to_be_bytes()[..]].concat(),
    };
    let mut frame = [&[0x81], &lengths[..]].concat();
    let header = frame.clone();
    frame[1] |= 0x80;
    let mask = [7, 1, 9, 3];
    frame.extend(mask);
    frame.extend(text.bytes().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    stream.get_mut().write_all(&frame).unwrap();
    let mut back = vec![0; header.len() + length];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(back[..header.len()], header);
    assert!(&back[header.len()..] == text.as_bytes(), "another message came back");
}

fn is_cut(mut stream: BufReader<PatientStream<TcpStream>>) {
    let mut rest = Vec::new();
    // An error also counts as an end, except a time-out.
    if let Err(error) = stream.read_to_end(&mut rest) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert!(rest.is_empty(), "{rest:?}");
}

/// Makes a VM with the server, as the template `base`. False without a guest.
fn template(host: &Host) -> bool {
    if !cached::ports_server(&host.runtime) {
        return false;
    }
    host.runtime.clade(&["checkpoint", "py", "base", "--json"]).json();
    true
}

fn create(host: &Host, key: &str, more: &str) -> (String, Value) {
    let body = format!(r#"{{"templateID": "base", "timeout": 7200{more}}}"#);
    let (status, made) = host.call(key, "POST", "/v2/sandboxes", &body);
    assert_eq!(status, 201, "{made}");
    (made["sandboxID"].as_str().unwrap().to_owned(), made)
}

#[test]
fn a_sandboxs_ports_are_reached_by_http_and_websockets() {
    if !kvm() {
        return;
    }
    let host = Host::new();
    if !template(&host) {
        return;
    }
    let key = host.key("me", "all");
    let (id, made) = create(&host, &key, "");
    let token = made["envdAccessToken"].as_str().unwrap();
    let (port, label) = (Port::by_headers(&host, &id, 8000), Port::by_host(&host, &id, 8000));
    for way in [&port, &label] {
        let begun = Instant::now();
        assert_eq!(way.get("/name"), (200, "template".to_owned()));
        println!("an answer came after {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
    }
    // With a key it is a call, unless the host's label names a port.
    let (_, head) =
        label.says("GET /head", &format!("x-api-key: {key}\r\nx-access-token: {token}\r\nx-own: 1\r\n"), "");
    assert!(!head.contains(&key) && !head.contains(token) && head.contains("x-own: 1"), "{head}");
    assert!(head.contains(&format!("host: 8000-{id}.box.test")), "{head}");
    streams(&port);
    closed_ports(&host, &id);
    websockets(&host, &key, &id);
    forks(&host, &key, &id);
    private(&host, &key);
    // The end of the sandbox cuts open connections.
    let mut socket = label.websocket("");
    echo(&mut socket, "last");
    assert_eq!(host.call(&key, "DELETE", &format!("/sandboxes/{id}"), "").0, 204);
    is_cut(socket);
    assert_eq!(label.get("/name").0, 502);
}

fn streams(port: &Port<'_>) {
    // Both the answer and the body are streamed. On a busy host the first line may be read late: then the next answer
    // shows it.
    wait_until("an answer whose first line comes long before its last", || {
        let mut stream = port.open("GET /ticks", "connection: close\r\n");
        let mut line = String::new();
        while !line.contains("tick 0") {
            line.clear();
            assert_ne!(stream.read_line(&mut line).unwrap(), 0);
        }
        let (first, mut rest) = (Instant::now(), String::new());
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("tick 2"), "{rest}");
        first.elapsed() > Duration::from_millis(1500)
    });
    let body = "x".repeat(1 << 18);
    let (begun, wanted) = (Instant::now(), "262144 ");
    let (status, sum) = port.says("POST /sum", "", &body);
    assert!(status == 200 && sum.starts_with(wanted), "{status} {sum}");
    println!("256 KiB up in {:.2} s", begun.elapsed().as_secs_f64());
    let mut stream = port.open("POST /sum", "connection: close\r\ntransfer-encoding: chunked\r\n");
    for piece in ["3\r\nabc\r\n", "1\r\nd\r\n", "0\r\n\r\n"] {
        stream.get_mut().write_all(piece.as_bytes()).unwrap();
    }
    head(&mut stream);
    let mut sum = String::new();
    stream.read_to_string(&mut sum).unwrap();
    assert!(sum.starts_with("4 88d4266fd4e6338d13b845fcf289579d209c8978"), "{sum}");
    let begun = Instant::now();
    let mut stream = port.open("GET /zeros", "connection: close\r\n");
    head(&mut stream);
    assert_eq!(std::io::copy(&mut stream, &mut std::io::sink()).unwrap(), 1 << 20);
    println!("1 MiB down in {:.2} s", begun.elapsed().as_secs_f64());
}

fn closed_ports(host: &Host, id: &str) {
    let (status, answer) = Port::by_headers(host, id, 22).get("/");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, &answer["port"], &answer["sandboxId"]), (502, &22.into(), &id.into()), "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("nothing listens at port 22"), "{answer}");
}

fn websockets(host: &Host, key: &str, id: &str) {
    let label = Port::by_host(host, id, 8000);
    let mut sockets: Vec<_> = (0..8).map(|_| label.websocket("")).collect();
    for (number, socket) in sockets.iter_mut().enumerate() {
        echo(socket, &format!("hello {number}"));
        echo(socket, &"x".repeat(2000));
    }
    let mut one = sockets.pop().unwrap();
    let begun = Instant::now();
    for _ in 0..20 {
        echo(&mut one, "ping");
    }
    println!("a message and its echo take {:.2} ms", begun.elapsed().as_secs_f64() * 1e3 / 20.0);
    // The guest closes after the client's last frame.
    one.get_mut().write_all(&[0x88, 0x80, 0, 0, 0, 0]).unwrap();
    let mut rest = Vec::new();
    one.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [0x88, 0]);
    // A pause cuts all connections. Afterwards new ones work.
    assert_eq!(host.call(key, "POST", &format!("/sandboxes/{id}/pause"), "{}").0, 204);
    for socket in sockets {
        is_cut(socket);
    }
    assert_eq!(label.get("/name").0, 502);
    assert_eq!(host.call(key, "POST", &format!("/sandboxes/{id}/connect"), r#"{"timeout": 7200}"#).0, 201);
    echo(&mut label.websocket(""), "again");
}

fn forks(host: &Host, key: &str, id: &str) {
    let parent = Port::by_host(host, id, 8000);
    assert_eq!(parent.says("PUT /name", "", "parent").0, 200);
    let mut open = parent.websocket("");
    echo(&mut open, "before");
    let (status, forked) = host.call(key, "POST", &format!("/sandboxes/{id}/fork"), r#"{"count": 2, "timeout": 7200}"#);
    assert_eq!(status, 201, "{forked}");
    let children: Vec<&str> =
        forked.as_array().unwrap().iter().map(|one| one["sandbox"]["sandboxID"].as_str().unwrap()).collect();
    for child in &children {
        let port = Port::by_host(host, child, 8000);
        assert_eq!(port.get("/name").1, "parent");
        assert_eq!(port.says("PUT /name", "", child).0, 200);
        echo(&mut port.websocket(""), child);
    }
    for child in &children {
        assert_eq!(Port::by_headers(host, child, 8000).get("/name").1, *child);
    }
    // The parent's own state, and its open connection, are unchanged.
    assert_eq!(parent.get("/name").1, "parent");
    echo(&mut open, "after");
    for child in children {
        assert_eq!(host.call(key, "DELETE", &format!("/sandboxes/{child}"), "").0, 204);
    }
}

fn private(host: &Host, key: &str) {
    let (id, made) =
        create(host, key, r#", "network": {"allowPublicTraffic": false, "maskRequestHost": "app:${PORT}"}"#);
    let token = made["trafficAccessToken"].as_str().unwrap();
    let port = Port::by_host(host, &id, 8000);
    for wrong in ["", "e2b-traffic-access-token: x\r\n"] {
        assert_eq!(port.says("GET /name", wrong, "").0, 403, "{wrong}");
    }
    let own = format!("e2b-traffic-access-token: {token}\r\n");
    let (status, head) = port.says("GET /head", &own, "");
    assert!(status == 200 && !head.contains(token) && head.contains("host: app:8000"), "{head}");
    echo(&mut port.websocket(&own), "private");
    assert_eq!(host.call(key, "DELETE", &format!("/sandboxes/{id}"), "").0, 204);
}
