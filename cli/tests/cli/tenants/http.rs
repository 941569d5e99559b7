//! Requests as literal bytes, and whole answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use clade_test_support::PatientStream;
use serde_json::Value;

/// A request. Its parts are sent as they are.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
    /// Whether HTTP does not allow the request. The server may cut the connection without an answer.
    pub(super) is_broken: bool,
}

impl Request {
    pub(super) fn new(method: &str, target: impl Into<String>) -> Self {
        let (method, target) = (method.to_owned(), target.into());
        Self { method, target, headers: Vec::new(), body: String::new(), is_broken: false }
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn body(self, body: impl Into<String>) -> Self {
        Self { body: body.into(), ..self }
    }

    pub(super) fn broken(self, is_broken: bool) -> Self {
        Self { is_broken, ..self }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.headers.iter().any(|(own, _)| own.eq_ignore_ascii_case(name))
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut text = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        if !self.has("host") {
            text += "host: x\r\n";
        }
        for (name, value) in &self.headers {
            text += &format!("{name}: {value}\r\n");
        }
        if !self.has("content-length") && (!self.body.is_empty() || !["GET", "HEAD"].contains(&self.method.as_str())) {
            text += &format!("content-length: {}\r\n", self.body.len());
        }
        (text + "\r\n" + &self.body).into_bytes()
    }
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// The lines of the head, without the date.
    pub(super) head: Vec<String>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let is_it = |line: &&String| line.split(':').next().is_some_and(|own| own.eq_ignore_ascii_case(name));
        self.head.iter().skip(1).find(is_it).and_then(|line| line.split_once(':')).map(|(_, value)| value.trim())
    }

    /// Returns all of its bytes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.head.join("\n").as_bytes(), b"\n", &self.body].concat()
    }
}

type Stream = BufReader<PatientStream<TcpStream>>;

/// A client that keeps its connection.
#[derive(Debug)]
pub(super) struct Client {
    address: String,
    stream: Option<Stream>,
}

impl Client {
    pub(super) fn new(address: &str) -> Self {
        Self { address: address.to_owned(), stream: None }
    }

    pub(super) fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap_or_else(|error| panic!("{}: {error}", self.address))
    }

    /// Drops the connection. The server cuts one that has been idle for minutes.
    pub(super) fn rest(&mut self) {
        self.stream = None;
    }

    /// Sends a request. None if the server cuts the connection without an answer.
    pub(super) fn send(&mut self, request: &Request) -> Option<Answer> {
        let kept = self.stream.take().filter(|_| !request.is_broken);
        let mut stream = kept.unwrap_or_else(|| BufReader::new(self.connect().into()));
        // A server that refuses early may not read all of the request.
        let _ = stream.get_mut().write_all(&request.bytes());
        let (answer, keeps) = read(&mut stream, request.method != "HEAD")?;
        if keeps && !request.is_broken {
            self.stream = Some(stream);
        }
        Some(answer)
    }
}

fn line(stream: &mut Stream) -> Option<String> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line).ok()?;
    let text = String::from_utf8_lossy(&line);
    text.strip_suffix("\r\n").map(str::to_owned)
}

/// Reads an answer. Returns it, and whether the connection may be used again.
fn read(stream: &mut Stream, may_have_body: bool) -> Option<(Answer, bool)> {
    let mut head = Vec::new();
    loop {
        match line(stream)? {
            end if end.is_empty() => break,
            line => head.push(line),
        }
    }
    let status = head.first()?.split(' ').nth(1)?.parse().ok()?;
    head.retain(|line| !line.to_ascii_lowercase().starts_with("date:"));
    let mut answer = Answer { status, head, body: Vec::new() };
    let closes = answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    if !may_have_body || matches!(status, 100..=199 | 204 | 304) {
        return Some((answer, !closes && status >= 200));
    }
    if answer.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        loop {
            let length = usize::from_str_radix(line(stream)?.split(';').next()?, 16).ok()?;
            let mut chunk = vec![0; length];
            stream.read_exact(&mut chunk).ok()?;
            answer.body.append(&mut chunk);
            line(stream)?;
            if length == 0 {
                return Some((answer, !closes));
            }
        }
    }
    match answer.header("content-length").map(str::parse) {
        Some(length) => {
            answer.body = vec![0; length.ok()?];
            stream.read_exact(&mut answer.body).ok()?;
            Some((answer, !closes))
        }
        None => {
            stream.read_to_end(&mut answer.body).ok()?;
            Some((answer, false))
        }
    }
}
