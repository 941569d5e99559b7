//! Calls: with one answer, and with a stream of them.

use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use clade_agent_proto::api::{Generation, Hook, HttpError, Init, Metrics, Ready, Shutdown};
use clade_agent_proto::code::EndOfStream;
use clade_agent_proto::envelope::{END_OF_STREAM, Envelopes, seal};
use clade_agent_proto::{
    KEEPALIVE_HEADER, MAX_MESSAGE, RpcError, STREAM_TYPE, TIMEOUT_HEADER, UNARY_TYPE, decode, encode,
};
use hyper::header::CONTENT_TYPE;
use hyper::http::request::Builder;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::connection::{Answer, Outgoing, SILENCE, within};
use crate::error::message_of_guest;
use crate::{Client, ClientError};

/// Interval of keepalives requested for a stream.
const KEEPALIVE_SECONDS: u32 = 20;

/// Most hooks, and most failed steps, that an agent reports. It runs 64 hooks at most.
const MAX_STEPS: usize = 64;
/// Maximum size of the answer with a guest's load: a host asks many guests at a time.
const MAX_METRICS: usize = 16 << 10;

pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ClientError> {
    decode(bytes).map_err(ClientError::answer)
}

fn whole(bytes: Vec<u8>) -> Outgoing {
    Outgoing::Whole(Some(Bytes::from(bytes)).filter(|bytes| !bytes.is_empty()))
}

/// The refusal in an answer.
pub(crate) async fn refusal(answer: &mut Answer) -> ClientError {
    let status = answer.response.status().as_u16();
    let bytes = match answer.whole().await {
        Ok(bytes) => bytes,
        Err(error) => return error,
    };
    if let Ok(error) = decode::<RpcError>(&bytes) {
        return error.into();
    }
    let message = decode::<HttpError>(&bytes).map_or_else(|_| format!("HTTP status {status}"), |error| error.message);
    ClientError::Refused { status, message: message_of_guest(&message) }
}

/// The messages of a stream, until its end.
#[derive(Debug)]
pub struct Messages<T> {
    answer: Answer,
    envelopes: Envelopes,
    message: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Messages<T> {
    pub(crate) fn new(answer: Answer) -> Self {
        Self { answer, envelopes: Envelopes::new(MAX_MESSAGE), message: PhantomData }
    }

    /// The next message; `None` after the last.
    ///
    /// # Errors
    /// When the call has failed, or the data is not a message.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        // A timeout for each whole message: one sent byte by byte would delay its reader without
        // limit.
        within(SILENCE, self.message()).await?
    }

    async fn message(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(envelope) = self.envelopes.next_envelope()? {
                if envelope.flags & END_OF_STREAM == 0 {
                    return read(&envelope.message).map(Some);
                }
                let end: EndOfStream = read(&envelope.message)?;
                return end.error.map_or(Ok(None), |error| Err(error.into()));
            }
            match self.answer.piece().await? {
                Some(piece) => self.envelopes.push(&piece),
                None => return Err(ClientError::Truncated),
            }
        }
    }
}

impl Client {
    async fn sent(&self, request: Builder, body: Outgoing, media_type: &'static str) -> Result<Answer, ClientError> {
        let request = request.header(CONTENT_TYPE, media_type).body(body).map_err(ClientError::Request)?;
        let mut answer = self.send(request).await?;
        if !answer.response.status().is_success() {
            return Err(refusal(&mut answer).await);
        }
        Ok(answer)
    }

    /// A call with one answer: `service.Service/Method`.
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn call<Q: Serialize, A: DeserializeOwned>(&self, method: &str, message: &Q) -> Result<A, ClientError> {
        self.call_for(method, message, MAX_MESSAGE).await
    }

    /// The same, for an answer of up to `most` bytes.
    pub(crate) async fn call_for<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: &str,
        message: &Q,
        most: usize,
    ) -> Result<A, ClientError> {
        let request = self.request("POST", &format!("/{method}"));
        let mut answer = self.sent(request, whole(encode(message)), UNARY_TYPE).await?;
        read(&answer.whole_of(most).await?)
    }

    /// A call with a stream of answers. The agent ends it after `timeout`.
    ///
    /// # Errors
    /// When there is no agent, or it refuses at once.
    pub async fn stream<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: &str,
        message: &Q,
        timeout: Option<Duration>,
    ) -> Result<Messages<A>, ClientError> {
        let mut request = self.request("POST", &format!("/{method}")).header(KEEPALIVE_HEADER, KEEPALIVE_SECONDS);
        if let Some(timeout) = timeout {
            request = request.header(TIMEOUT_HEADER, timeout.as_millis().clamp(1, 9_999_999_999).to_string());
        }
        let answer = self.sent(request, whole(seal(message)), STREAM_TYPE).await?;
        Ok(Messages::new(answer))
    }

    /// A call with a stream of requests: each piece is a message in its envelope.
    pub(crate) async fn send_stream<A: DeserializeOwned>(
        &self,
        method: &str,
        body: Outgoing,
    ) -> Result<A, ClientError> {
        let answer = self.sent(self.request("POST", &format!("/{method}")), body, STREAM_TYPE).await?;
        Messages::new(answer).next().await?.ok_or(ClientError::Truncated)
    }

    async fn plain(&self, method: &str, path: &str, body: Vec<u8>) -> Result<Vec<u8>, ClientError> {
        self.sent(self.request(method, path), whole(body), UNARY_TYPE).await?.whole().await
    }

    /// Checks that an agent answers.
    ///
    /// # Errors
    /// When there is no agent.
    pub async fn health(&self) -> Result<(), ClientError> {
        self.plain("GET", "/health", Vec::new()).await.map(drop)
    }

    /// The guest's use of its processors, memory and disk.
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn metrics(&self) -> Result<Metrics, ClientError> {
        let mut answer = self.sent(self.request("GET", "/metrics"), whole(Vec::new()), UNARY_TYPE).await?;
        read(&answer.whole_of(MAX_METRICS).await?)
    }

    /// Sets the agent's token, defaults and time.
    ///
    /// # Errors
    /// When there is no agent, or it refuses: another token is set.
    pub async fn init(&self, init: &Init) -> Result<(), ClientError> {
        self.plain("POST", "/init", encode(init)).await.map(drop)
    }

    /// Notifies the agent that its VM is another one, and waits until it is ready.
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn change_generation(&self, generation: &Generation) -> Result<Ready, ClientError> {
        let Ready { generation, hooks, failed } =
            read(&self.plain("POST", "/clade/generation", encode(generation)).await?)?;
        let plain = |hook: Hook| Hook { name: message_of_guest(&hook.name), status: message_of_guest(&hook.status) };
        let hooks = hooks.into_iter().take(MAX_STEPS).map(plain).collect();
        let failed = failed.iter().take(MAX_STEPS).map(|step| message_of_guest(step)).collect();
        Ok(Ready { generation, hooks, failed })
    }

    /// Has the agent remember the files of the root file system, for [`Client::layer`].
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn begin_layer(&self) -> Result<(), ClientError> {
        self.plain("POST", "/clade/layer/begin", Vec::new()).await.map(drop)
    }

    /// Has the guest end in order. Its programs have the time `grace` to end in, if given.
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn shut_down(&self, grace: Option<Duration>) -> Result<(), ClientError> {
        let grace_ms = grace.map(|grace| u64::try_from(grace.as_millis()).unwrap_or(u64::MAX));
        self.plain("POST", "/clade/shutdown", encode(&Shutdown { grace_ms })).await.map(drop)
    }
}
