//! `clade exec` and `clade shell`: programs in a guest, with this terminal's input and output.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Read, Write};
use std::time::Duration;

use anyhow::anyhow;
use clade_agent_client::proto::process::{DataEvent, EndEvent, ProcessConfig, Pty, Signal, Size, StartRequest};
use clade_agent_client::proto::{Base64, Code};
use clade_agent_client::{Client, ClientError, Input, Process};
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use crate::commands::agent::{AgentArgs, block_on};
use crate::commands::terminal::RawMode;
use crate::commands::units::parse_duration;
use crate::commands::{Failure, Outcome, print_bytes, print_json};

/// The program did not run: no VM, no agent, or a refusal.
const NOT_RUN: u8 = 125;
/// The program exists, and may not be run.
const NOT_EXECUTABLE: u8 = 126;
/// The program does not exist.
const NOT_FOUND: u8 = 127;
/// Time that a guest has beyond its limit to report that the program was killed.
const GRACE: Duration = Duration::from_secs(30);
/// Most bytes of output in an answer of `--json`.
const MAX_OUTPUT: usize = 16 << 20;
/// The size of a terminal that reports none.
const SIZE: Size = Size { cols: 80, rows: 24 };
const CTRL_D: u8 = 4;

#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    name: String,
    #[command(flatten)]
    agent: AgentArgs,
    /// Give the program a terminal.
    #[arg(long, short)]
    tty: bool,
    /// Pass on standard input.
    #[arg(long, short)]
    interactive: bool,
    /// The working directory. Default: the image's, else the user's home.
    #[arg(long, short = 'w', value_name = "DIR")]
    workdir: Option<String>,
    /// A variable of the environment. Repeatable.
    #[arg(long, short, value_name = "KEY=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Time limit, such as 90s, 5m or 1h30m. Then the program is killed, and the exit code is 124.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Print the program's end and output as JSON when it has ended.
    #[arg(long, conflicts_with_all = ["tty", "interactive"])]
    json: bool,
    /// The program and its arguments.
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ShellArgs {
    /// The VM.
    #[arg(value_name = "VM")]
    name: String,
    #[command(flatten)]
    agent: AgentArgs,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("KEY=VALUE is wanted".to_owned()),
    }
}

/// Parses a variable. Without a value it has the one of this command's own environment.
pub(super) fn parse_env_or_own(text: &str) -> Result<(String, String), String> {
    if text.is_empty() || text.contains('=') {
        return parse_env(text);
    }
    match std::env::var(text) {
        Ok(value) => Ok((text.to_owned(), value)),
        Err(_) => Err(format!("{text} is not set here")),
    }
}

/// The output of `--json`.
#[derive(Debug, Serialize)]
struct ProgramResult {
    exit_code: i32,
    status: String,
    stdout: String,
    stderr: String,
}

/// Describes the failure of a program that did not end by itself.
fn not_ended(error: ClientError) -> Failure {
    let code = match &error {
        ClientError::Rpc(rpc) if rpc.code == Code::DeadlineExceeded => return Failure::Timeout(error.into()),
        _ => NOT_RUN,
    };
    Failure::Exit(code, Some(error.into()))
}

fn not_started(error: ClientError) -> Failure {
    let code = match &error {
        ClientError::Rpc(rpc) if rpc.code == Code::NotFound => NOT_FOUND,
        ClientError::Rpc(rpc) if rpc.code == Code::PermissionDenied => NOT_EXECUTABLE,
        _ => return not_ended(error),
    };
    Failure::Exit(code, Some(error.into()))
}

/// A failure before the program has run.
fn not_run(failure: Failure) -> Failure {
    match failure {
        Failure::Input(error) | Failure::Run(error) => Failure::Exit(NOT_RUN, Some(error)),
        other => other,
    }
}

fn size() -> Size {
    let own = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin()));
    match own {
        Ok(own) if own.ws_col > 0 && own.ws_row > 0 => Size { cols: own.ws_col.into(), rows: own.ws_row.into() },
        _ => SIZE,
    }
}

/// Returns the typed input, until its end. The thread ends with the process: a read of a terminal
/// cannot be cancelled.
fn typed() -> io::Result<mpsc::Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        let mut bytes = vec![0; 32 << 10];
        while let Ok(length @ 1..) = io::stdin().lock().read(&mut bytes) {
            if sender.blocking_send(bytes[..length].to_vec()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("clade-stdin".into()).spawn(read)?;
    Ok(receiver)
}

/// Forwards standard input until its end, and then closes the program's.
async fn feed(client: Client, pid: u32, is_terminal: bool, mut from: mpsc::Receiver<Vec<u8>>) {
    let (input, call) = client.input(pid, is_terminal);
    let send = async move {
        let mut input: Input = input;
        while let Some(bytes) = from.recv().await {
            if !input.send(&bytes).await {
                return;
            }
        }
        if is_terminal {
            input.send(&[CTRL_D]).await;
        }
    };
    // A program that no longer reads, or has ended, does not fail the command.
    let (_, _) = tokio::join!(send, call);
    if !is_terminal {
        let _ = client.close_stdin(pid).await;
    }
}

/// Signals to this process that are forwarded to the program.
struct Passed {
    signals: Vec<(i32, Signals)>,
    resized: Signals,
}

impl Passed {
    fn new() -> io::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()];
        let signals = kinds.iter().map(|kind| Ok((kind.as_raw_value(), signal(*kind)?))).collect::<io::Result<_>>()?;
        Ok(Self { signals, resized: signal(SignalKind::window_change())? })
    }

    /// Returns the next signal; `None` when the terminal's size has changed.
    async fn next(&mut self) -> Option<i32> {
        let [(one, interrupt), (two, terminate), (three, hangup), (four, quit)] = &mut self.signals[..] else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = interrupt.recv() => Some(*one),
            _ = terminate.recv() => Some(*two),
            _ = hangup.recv() => Some(*three),
            _ = quit.recv() => Some(*four),
            _ = self.resized.recv() => None,
        }
    }
}

/// The output of a program for `--json`. A character may begin in one event and end in the next.
#[derive(Debug, Default)]
struct KeptOutput {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl KeptOutput {
    fn push(&mut self, stdout: &[u8], stderr: &[u8]) -> Result<(), Failure> {
        if self.stdout.len() + self.stderr.len() + stdout.len() + stderr.len() > MAX_OUTPUT {
            return Err(Failure::run(anyhow!("the program has written more than {MAX_OUTPUT} bytes")));
        }
        self.stdout.extend_from_slice(stdout);
        self.stderr.extend_from_slice(stderr);
        Ok(())
    }

    fn into_result(self, end: &EndEvent) -> ProgramResult {
        let text = |bytes: Vec<u8>| {
            String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
        };
        let (stdout, stderr) = (text(self.stdout), text(self.stderr));
        ProgramResult { exit_code: end.exit_code, status: end.status.clone(), stdout, stderr }
    }
}

/// The destination of output.
enum Output {
    Terminal,
    Kept(KeptOutput),
}

impl Output {
    fn take(&mut self, data: DataEvent) -> Result<(), Failure> {
        let bytes = |bytes: Option<Base64>| bytes.map(|bytes| bytes.0).unwrap_or_default();
        let (stderr, stdout) = (bytes(data.stderr), [bytes(data.stdout), bytes(data.pty)].concat());
        match self {
            Self::Terminal => print_bytes(&stdout).and_then(|()| io::stderr().write_all(&stderr)).map_err(Failure::run),
            Self::Kept(kept) => kept.push(&stdout, &stderr),
        }
    }
}

/// Follows a process to its end.
async fn follow(
    client: &Client,
    mut process: Process,
    is_terminal: bool,
    output: &mut Output,
) -> Result<EndEvent, Failure> {
    let mut passed = Passed::new().map_err(Failure::run)?;
    let mut end = None;
    loop {
        tokio::select! {
            event = process.next() => match event.map_err(not_ended)? {
                Some(event) => {
                    if let Some(data) = event.data && let Err(failure) = output.take(data) {
                        // Without a reader of its output the program must not stay behind.
                        let _ = client.signal(process.pid, Signal::KILL).await;
                        return Err(failure);
                    }
                    end = event.end.or(end);
                }
                None => return end.ok_or_else(|| not_ended(ClientError::Truncated)),
            },
            signal = passed.next() => match signal {
                // The program may have ended.
                Some(number) => drop(client.signal(process.pid, Signal(number)).await),
                None if is_terminal => drop(client.resize(process.pid, size()).await),
                None => {}
            },
        }
    }
}

/// Waits for `work` until that time, if there is one.
async fn by<T>(until: Option<Instant>, work: impl Future<Output = T>) -> Result<T, Failure> {
    let Some(until) = until else { return Ok(work.await) };
    let late = |_| Failure::Timeout(anyhow!("the guest has not ended the program in its time"));
    timeout_at(until, work).await.map_err(late)
}

async fn exec(args: ExecArgs) -> Outcome {
    let client = args.agent.client(&args.name).await.map_err(not_run)?;
    let mut envs: BTreeMap<String, String> = args.env.into_iter().collect();
    if args.tty
        && let Ok(term) = std::env::var("TERM")
    {
        envs.entry("TERM".to_owned()).or_insert(term);
    }
    let (cmd, arguments) = args.command.split_first().ok_or_else(|| Failure::input(anyhow!("no command is named")))?;
    let request = StartRequest {
        process: ProcessConfig { cmd: cmd.clone(), args: arguments.to_vec(), envs, cwd: args.workdir },
        pty: args.tty.then(|| Pty { size: size() }),
        tag: None,
        stdin: Some(args.interactive),
        kill_rest: false,
    };
    // The agent kills the program. The wait does not depend on it.
    let until = args.timeout.and_then(|time| Instant::now().checked_add(time.saturating_add(GRACE)));
    let process = by(until, client.start(&request, args.timeout)).await?.map_err(not_started)?;
    let raw = if args.tty && args.interactive { RawMode::enter().map_err(Failure::run)? } else { None };
    let fed = if args.interactive {
        let from = typed().map_err(Failure::run)?;
        Some(tokio::spawn(feed(client.clone(), process.pid, args.tty, from)))
    } else {
        None
    };
    let mut output = if args.json { Output::Kept(KeptOutput::default()) } else { Output::Terminal };
    let end = by(until, follow(&client, process, args.tty, &mut output)).await;
    drop(raw);
    if let Some(fed) = fed {
        fed.abort();
    }
    let end = end??;
    if let Output::Kept(kept) = output {
        print_json(&kept.into_result(&end)).map_err(Failure::run)?;
    }
    match end.shell_code() {
        0 => Ok(()),
        code => Err(Failure::Exit(code, None)),
    }
}

pub(super) fn main(args: ExecArgs) -> Outcome {
    block_on(exec(args))
}

/// Runs a login shell: bash if the guest has it.
pub(super) fn shell(args: ShellArgs) -> Outcome {
    let script = "command -v bash >/dev/null && exec bash -l; exec sh -l";
    let has_terminal = io::stdin().is_terminal();
    main(ExecArgs {
        name: args.name,
        agent: args.agent,
        tty: has_terminal,
        interactive: true,
        workdir: None,
        env: Vec::new(),
        timeout: None,
        json: false,
        command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clade_agent_client::proto::RpcError;

    #[test]
    fn what_did_not_run_has_a_code_that_says_why() {
        let code = |code| not_started(RpcError::new(code, "").into()).code();
        assert_eq!([code(Code::NotFound), code(Code::PermissionDenied)], [127, 126]);
        assert_eq!([code(Code::InvalidArgument), code(Code::DeadlineExceeded)], [125, 124]);
        assert_eq!(not_run(Failure::input(anyhow!("no VM"))).code(), 125);
        assert_eq!(parse_env("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        parse_env("=c").unwrap_err();
    }

    #[test]
    fn a_character_in_two_events_is_whole_and_output_has_an_exact_bound() {
        let mut output = Output::Kept(KeptOutput::default());
        let event = |stdout: &[u8], stderr: &[u8]| DataEvent {
            stdout: Some(Base64(stdout.to_vec())),
            stderr: Some(Base64(stderr.to_vec())),
            ..DataEvent::default()
        };
        // U+20AC is e2 82 ac, and ff is in no character.
        for (stdout, stderr) in [(&b"1 \xe2"[..], &b"\xe2\x82"[..]), (b"\x82", b"\xac\xff"), (b"\xac", b"")] {
            output.take(event(stdout, stderr)).unwrap();
        }
        let kept = if let Output::Kept(kept) = output { kept } else { KeptOutput::default() };
        let result = kept.into_result(&EndEvent { exit_code: 3, ..EndEvent::default() });
        let printed = (result.exit_code, &*result.stdout, &*result.stderr);
        assert_eq!(printed, (3, "1 \u{20ac}", "\u{20ac}\u{fffd}"));

        let mut output = Output::Kept(KeptOutput::default());
        output.take(event(&[0xff].repeat(MAX_OUTPUT - 1), b"")).unwrap();
        output.take(event(b"", &[0xff])).unwrap();
        output.take(event(b"", b"x")).unwrap_err();
    }
}
