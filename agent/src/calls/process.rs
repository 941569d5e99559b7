//! The service `process.Process`.

use std::sync::Arc;
use std::time::Duration;

use clade_agent_proto::process::{
    CloseStdinRequest, ConnectRequest, Empty, EndEvent, EventResponse, KeepAlive, ListResponse, ProcessEvent,
    ProcessInput, SendInputRequest, SendSignalRequest, Signal, StartEvent, StartRequest, StreamInputRequest,
    UpdateRequest,
};
use clade_agent_proto::{Code, RpcError};
use rustix::io::Errno;
use rustix::termios::tcsetwinsize;
use tokio::io::Interest;
use tokio::sync::mpsc;

use crate::agent::Agent;
use crate::connect::{Caller, Messages, Sink};
use crate::process::Process;
use crate::process::output::{self, OutputSource};
use crate::process::spawn::{self, Started, Streams};
use crate::process::table::{Found, Input, MAX_PROCESSES};
use crate::program::SpawnEnv;
use crate::stream::Stream;

fn started(pid: u32) -> EventResponse {
    EventResponse { event: ProcessEvent { start: Some(StartEvent { pid }), ..ProcessEvent::default() } }
}

fn ended(end: EndEvent) -> EventResponse {
    EventResponse { event: ProcessEvent { end: Some(end), ..ProcessEvent::default() } }
}

/// Passes events on to a client, up to the last one.
async fn forward(
    sink: &mut Sink,
    mut events: mpsc::Receiver<ProcessEvent>,
    keepalive: Duration,
) -> Result<(), RpcError> {
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = tokio::time::sleep(keepalive) => {
                Some(ProcessEvent { keepalive: Some(KeepAlive {}), ..ProcessEvent::default() })
            }
            () = sink.closed() => return Ok(()),
        };
        let event = event.ok_or_else(|| RpcError::new(Code::Aborted, "the process is not followed any more"))?;
        let is_last = event.end.is_some();
        sink.send(&EventResponse { event }).await?;
        if is_last {
            return Ok(());
        }
    }
}

impl Agent {
    pub(crate) fn list(&self) -> ListResponse {
        ListResponse { processes: self.processes.list() }
    }

    /// Starts a process.
    fn begin(self: &Arc<Self>, request: StartRequest, caller: &Caller) -> Result<Arc<Process>, RpcError> {
        if self.processes.len() >= MAX_PROCESSES {
            return Err(RpcError::new(Code::ResourceExhausted, format_args!("{MAX_PROCESSES} processes run already")));
        }
        let user = caller.user(self)?;
        let (envs, workdir) = {
            let settings = self.settings();
            (Arc::clone(&settings.envs), settings.workdir.clone())
        };
        let spawn_env = SpawnEnv { user: &user, envs: &envs, workdir: workdir.as_deref() };
        let Started { child, streams } = spawn::start(&self.children, &request, &spawn_env)?;
        let (input, outputs) = match streams {
            Streams::Pty(master) => {
                let master = Arc::new(master);
                (Input::Pty(Arc::clone(&master)), vec![(master, OutputSource::Pty)])
            }
            Streams::Pipes { stdin, stdout, stderr } => {
                let outputs = vec![(Arc::new(stdout), OutputSource::Stdout), (Arc::new(stderr), OutputSource::Stderr)];
                (Input::Pipe(tokio::sync::Mutex::new(stdin)), outputs)
            }
        };
        let kill_rest = request.kill_rest;
        let process = Arc::new(Process::new(child.pid, child.is_reaped, request.tag, request.process, input));
        self.processes.insert(&process);
        let (agent, pumped, timeout) = (Arc::clone(self), Arc::clone(&process), caller.timeout);
        tokio::spawn(async move {
            let mut pump = std::pin::pin!(output::pump(Arc::clone(&pumped), outputs, child.end, kill_rest));
            let end = match timeout {
                None => pump.await,
                Some(time) => match tokio::time::timeout(time, &mut pump).await {
                    Ok(end) => end,
                    Err(_) => {
                        // The process may have ended already.
                        let _ = pumped.signal(Signal::KILL.0);
                        pump.await
                    }
                },
            };
            // Remembered first, so that a late follower finds it in one place or the other.
            agent.processes.end(&pumped, end.clone());
            pumped.finish(end).await;
        });
        Ok(process)
    }

    /// `Start`: the process survives its client, and is killed when its time is over.
    pub(crate) async fn start(
        self: Arc<Self>,
        request: StartRequest,
        caller: Caller,
        mut sink: Sink,
    ) -> Result<(), RpcError> {
        let process = self.begin(request, &caller)?;
        let events = process.follow();
        sink.send(&started(process.pid)).await?;
        forward(&mut sink, events, caller.keepalive).await
    }

    /// `Connect`: the events of a process from now on.
    pub(crate) async fn connect(
        self: Arc<Self>,
        request: ConnectRequest,
        caller: Caller,
        mut sink: Sink,
    ) -> Result<(), RpcError> {
        match self.processes.find(&request.process)? {
            Found::Running(process) => {
                let events = process.follow();
                sink.send(&started(process.pid)).await?;
                forward(&mut sink, events, caller.keepalive).await
            }
            Found::Ended(pid, end) => {
                sink.send(&started(pid)).await?;
                sink.send(&ended(end)).await
            }
        }
    }

    pub(crate) fn update(&self, request: &UpdateRequest) -> Result<Empty, RpcError> {
        let process = self.processes.running(&request.process)?;
        let Some(wanted) = request.pty else { return Ok(Empty {}) };
        let Input::Pty(terminal) = &process.input else {
            return Err(RpcError::new(Code::FailedPrecondition, "the process has no terminal"));
        };
        tcsetwinsize(terminal.get_ref(), spawn::window(wanted.size)).map_err(RpcError::internal)?;
        Ok(Empty {})
    }

    pub(crate) async fn send_input(&self, request: SendInputRequest) -> Result<Empty, RpcError> {
        let process = self.processes.running(&request.process)?;
        write(&process, request.input).await?;
        Ok(Empty {})
    }

    /// `StreamInput`: pieces of input in their order.
    pub(crate) async fn stream_input(&self, mut messages: Messages) -> Result<Empty, RpcError> {
        let mut process = None;
        while let Some(message) = messages.next::<StreamInputRequest>().await? {
            match (message.start, message.data, &process) {
                (Some(start), None, _) => process = Some(self.processes.running(&start.process)?),
                (None, Some(data), Some(process)) => write(process, data.input).await?,
                (None, Some(_), None) => return Err(RpcError::invalid("the first message names the process")),
                (None, None, _) if message.keepalive.is_some() => {}
                _ => return Err(RpcError::new(Code::Unimplemented, "a message is a start, data or a keepalive")),
            }
        }
        Ok(Empty {})
    }

    pub(crate) async fn close_stdin(&self, request: CloseStdinRequest) -> Result<Empty, RpcError> {
        let process = self.processes.running(&request.process)?;
        let Input::Pipe(stdin) = &process.input else {
            let why = "a terminal has no end: write Ctrl-D (4) to it";
            return Err(RpcError::new(Code::FailedPrecondition, why));
        };
        drop(stdin.lock().await.take());
        Ok(Empty {})
    }

    pub(crate) fn send_signal(&self, request: &SendSignalRequest) -> Result<Empty, RpcError> {
        self.processes.running(&request.process)?.signal(request.signal.0)?;
        Ok(Empty {})
    }
}

/// Writes to a process. Waits for the process to read.
async fn write(process: &Process, input: ProcessInput) -> Result<(), RpcError> {
    match (input.stdin, input.pty, &process.input) {
        (Some(bytes), None, Input::Pipe(stdin)) => {
            let mut stdin = stdin.lock().await;
            let Some(stream) = &*stdin else {
                return Err(RpcError::new(Code::FailedPrecondition, "the standard input is closed"));
            };
            let written = write_all(stream, &bytes.0).await;
            if written.is_err() {
                *stdin = None;
            }
            written
        }
        (None, Some(bytes), Input::Pty(terminal)) => write_all(terminal, &bytes.0).await,
        (Some(_), None, Input::Pty(_)) => {
            Err(RpcError::new(Code::FailedPrecondition, "the process has a terminal: its input is written to that"))
        }
        (None, Some(_), Input::Pipe(_)) => {
            Err(RpcError::new(Code::FailedPrecondition, "the process has no terminal: its input is standard input"))
        }
        _ => Err(RpcError::new(Code::Unimplemented, "input is for standard input or for a terminal")),
    }
}

async fn write_all(stream: &Stream, mut bytes: &[u8]) -> Result<(), RpcError> {
    while !bytes.is_empty() {
        let written = stream.async_io(Interest::WRITABLE, |fd| match rustix::io::write(fd, bytes) {
            Err(Errno::INTR) => Ok(0),
            written => written.map_err(Into::into),
        });
        let written = written
            .await
            .map_err(|error| RpcError::new(Code::FailedPrecondition, format_args!("it cannot be written: {error}")))?;
        bytes = &bytes[written..];
    }
    Ok(())
}
