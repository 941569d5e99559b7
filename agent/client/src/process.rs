//! Processes in the guest.

use std::time::Duration;

use bytes::Bytes;
use clade_agent_proto::Base64;
use clade_agent_proto::envelope::seal;
use clade_agent_proto::process::{
    CloseStdinRequest, ConnectRequest, Empty, EventResponse, InputData, InputStart, ListResponse, ProcessEvent,
    ProcessInput, Pty, Selector, SendSignalRequest, Signal, Size, StartRequest, StreamInputRequest, UpdateRequest,
};
use tokio::sync::mpsc;

use crate::connection::Outgoing;
use crate::{Client, ClientError, Messages};

/// A process whose events are followed.
#[derive(Debug)]
pub struct Process {
    /// Its number in the guest.
    pub pid: u32,
    events: Messages<EventResponse>,
}

impl Process {
    /// The next event; `None` after the last.
    ///
    /// # Errors
    /// When the call's time is over, or the connection has failed.
    pub async fn next(&mut self) -> Result<Option<ProcessEvent>, ClientError> {
        Ok(self.events.next().await?.map(|message| message.event))
    }
}

/// A stream of input to a process.
#[derive(Debug)]
pub struct Input {
    sender: mpsc::Sender<Bytes>,
    is_terminal: bool,
}

impl Input {
    /// Sends bytes. Waits until earlier bytes are in transit. Returns `false` if the input is no
    /// longer read.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        let bytes = Some(Base64(bytes.to_vec()));
        let input = if self.is_terminal {
            ProcessInput { pty: bytes, stdin: None }
        } else {
            ProcessInput { stdin: bytes, pty: None }
        };
        let message = StreamInputRequest { data: Some(InputData { input }), ..StreamInputRequest::default() };
        self.sender.send(seal(&message).into()).await.is_ok()
    }
}

impl Client {
    /// Starts a process. The agent kills it after `timeout`.
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn start(&self, request: &StartRequest, timeout: Option<Duration>) -> Result<Process, ClientError> {
        self.followed("process.Process/Start", request, timeout).await
    }

    /// Follows a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn follow(&self, process: Selector) -> Result<Process, ClientError> {
        self.followed("process.Process/Connect", &ConnectRequest { process }, None).await
    }

    async fn followed<Q: serde::Serialize>(
        &self,
        method: &str,
        request: &Q,
        timeout: Option<Duration>,
    ) -> Result<Process, ClientError> {
        let mut events = self.stream::<_, EventResponse>(method, request, timeout).await?;
        let first = events.next().await?.and_then(|message| message.event.start);
        let start = first.ok_or_else(|| ClientError::answer("the first event is no start"))?;
        Ok(Process { pid: start.pid, events })
    }

    /// The processes that clients have started.
    ///
    /// # Errors
    /// When there is no agent, or it refuses.
    pub async fn list(&self) -> Result<ListResponse, ClientError> {
        self.call("process.Process/List", &Empty {}).await
    }

    /// A stream of input to a process, and the call that writes it. The call ends when the stream
    /// is dropped and the process has all of its bytes.
    pub fn input(
        &self,
        pid: u32,
        is_terminal: bool,
    ) -> (Input, impl Future<Output = Result<(), ClientError>> + Send + use<>) {
        let (sender, pieces) = mpsc::channel(2);
        let client = self.clone();
        let start = InputStart { process: Selector::pid(pid) };
        let first = StreamInputRequest { start: Some(start), ..StreamInputRequest::default() };
        // The empty channel has room for it.
        let _ = sender.try_send(seal(&first).into());
        let call = async move {
            let body = Outgoing::Pieces(pieces);
            client.send_stream::<Empty>("process.Process/StreamInput", body).await.map(drop)
        };
        (Input { sender, is_terminal }, call)
    }

    /// Ends the standard input of a process.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn close_stdin(&self, pid: u32) -> Result<(), ClientError> {
        let request = CloseStdinRequest { process: Selector::pid(pid) };
        self.call::<_, Empty>("process.Process/CloseStdin", &request).await.map(drop)
    }

    /// Sends a signal to a process and its group.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn signal(&self, pid: u32, signal: Signal) -> Result<(), ClientError> {
        let request = SendSignalRequest { process: Selector::pid(pid), signal };
        self.call::<_, Empty>("process.Process/SendSignal", &request).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// When there is no such process, or it has no terminal.
    pub async fn resize(&self, pid: u32, size: Size) -> Result<(), ClientError> {
        let request = UpdateRequest { process: Selector::pid(pid), pty: Some(Pty { size }) };
        self.call::<_, Empty>("process.Process/Update", &request).await.map(drop)
    }
}
