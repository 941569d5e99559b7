//! E2B's API over HTTP, without an SDK: each call has a connection of its own, like a new client's.

use std::net::SocketAddr;

use anyhow::{Context, anyhow, bail, ensure};
use bytes::Bytes;
use clade_agent_client::proto::code::EndOfStream;
use clade_agent_client::proto::envelope::{END_OF_STREAM, Envelopes, seal};
use clade_agent_client::proto::process::{EventResponse, ProcessConfig, StartRequest};
use clade_agent_client::proto::{KEEPALIVE_HEADER, MAX_MESSAGE, PORT, STREAM_TYPE, TOKEN_HEADER, decode};
use http_body_util::{BodyExt, Collected, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::http::request::Builder;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// Time of a sandbox in seconds, more than needed.
const SANDBOX_SECONDS: u64 = 900;
/// Most bytes of an answer.
const MAX_ANSWER: usize = 4 << 20;

/// An address of the API, and a key.
#[derive(Debug)]
pub(super) struct Api {
    pub(super) address: SocketAddr,
    pub(super) key: String,
}

/// A sandbox.
#[derive(Clone, Debug)]
pub(super) struct Sandbox {
    pub(super) id: String,
    token: String,
}

impl Sandbox {
    fn of(value: &Value) -> anyhow::Result<Self> {
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        text("sandboxID")
            .zip(text("envdAccessToken"))
            .map(|(id, token)| Self { id, token })
            .ok_or_else(|| anyhow!("unexpected sandbox in the answer: {value}"))
    }
}

impl Api {
    async fn send(&self, request: Builder, body: impl Into<Bytes>) -> anyhow::Result<Response<Incoming>> {
        let stream = TcpStream::connect(self.address).await.context("E2B's API")?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // The connection ends with the answer, which also has its error.
        tokio::spawn(connection);
        let request: Request<Full<Bytes>> =
            request.header(HOST, self.address.to_string()).body(Full::new(body.into()))?;
        Ok(sender.send_request(request).await?)
    }

    /// One call of the API.
    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let request = Request::builder().method(method).uri(path).header("x-api-key", &self.key);
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let answer = self.send(request.header(CONTENT_TYPE, "application/json"), body).await?;
        let status = answer.status();
        let read = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
        let bytes = read.map_err(|error| anyhow!("{path}: {error}"))?.to_bytes();
        let text = String::from_utf8_lossy(&bytes);
        ensure!(status.is_success(), "{path}: {status}: {text}");
        if text.is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&text)?) }
    }

    pub(super) async fn create(&self, template: &str) -> anyhow::Result<Sandbox> {
        let body = json!({"templateID": template, "timeout": SANDBOX_SECONDS});
        Sandbox::of(&self.call(Method::POST, "/v2/sandboxes", Some(body)).await?)
    }

    /// Forks a sandbox. Returns a sandbox or an error for each child.
    pub(super) async fn fork(&self, id: &str, count: usize) -> anyhow::Result<Vec<anyhow::Result<Sandbox>>> {
        let body = json!({"count": count, "timeout": SANDBOX_SECONDS});
        let made = self.call(Method::POST, &format!("/sandboxes/{id}/fork"), Some(body)).await?;
        let made = made.as_array().ok_or_else(|| anyhow!("no list of forks: {made}"))?;
        let one = |forked: &Value| match &forked["error"] {
            Value::Null => Sandbox::of(&forked["sandbox"]),
            error => Err(anyhow!("{error}")),
        };
        Ok(made.iter().map(one).collect())
    }

    pub(super) async fn kill(&self, id: &str) -> anyhow::Result<()> {
        self.call(Method::DELETE, &format!("/sandboxes/{id}"), None).await.map(drop)
    }

    /// Runs a program through the API's address, as an SDK does. Returns its output.
    pub(super) async fn exec(&self, sandbox: &Sandbox, command: &[&str]) -> anyhow::Result<String> {
        let mut words = command.iter().map(|&word| word.to_owned());
        let cmd = words.next().unwrap_or_default();
        let process = ProcessConfig { cmd, args: words.collect(), ..ProcessConfig::default() };
        let start = StartRequest { process, stdin: Some(false), ..StartRequest::default() };
        let request = Request::builder()
            .method(Method::POST)
            .uri("/process.Process/Start")
            .header("e2b-sandbox-id", &sandbox.id)
            .header("e2b-sandbox-port", PORT)
            .header(TOKEN_HEADER, &sandbox.token)
            .header(KEEPALIVE_HEADER, 20)
            .header(CONTENT_TYPE, STREAM_TYPE);
        let answer = self.send(request, seal(&start)).await?;
        if !answer.status().is_success() {
            let status = answer.status();
            let read = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
            let why = read.map(Collected::to_bytes).unwrap_or_default();
            bail!("the command: {status}: {}", String::from_utf8_lossy(&why));
        }
        let (mut body, mut envelopes, mut said) = (answer.into_body(), Envelopes::new(MAX_MESSAGE), Vec::new());
        while let Some(frame) = body.frame().await {
            let Ok(piece) = frame?.into_data() else { continue };
            envelopes.push(&piece);
            while let Some(envelope) = envelopes.next_envelope()? {
                if envelope.flags & END_OF_STREAM != 0 {
                    let end: EndOfStream = decode(&envelope.message).map_err(|error| anyhow!("{error}"))?;
                    return end
                        .error
                        .map_or(Ok(String::from_utf8_lossy(&said).into_owned()), |error| Err(error.into()));
                }
                let event: EventResponse = decode(&envelope.message).map_err(|error| anyhow!("{error}"))?;
                let data = event.event.data.unwrap_or_default();
                said.extend([data.stdout, data.stderr].into_iter().flatten().flat_map(|bytes| bytes.0));
            }
        }
        Err(anyhow!("the command's answer ends too early"))
    }
}
