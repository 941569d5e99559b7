//! The processes that clients have started.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clade_agent_proto::process::{EndEvent, ProcessConfig, ProcessEvent, ProcessInfo, Selector};
use clade_agent_proto::{Code, RpcError};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::sync::{Notify, mpsc};

use crate::lock::lock;
use crate::stream::Stream;

/// How long the end of a process is remembered, for late followers.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Maximum number of remembered ends.
const MAX_REMEMBERED: usize = 1024;
/// Maximum number of processes.
pub(crate) const MAX_PROCESSES: usize = 4096;

/// The input of a process.
#[derive(Debug)]
pub(crate) enum Input {
    Pty(Arc<Stream>),
    Pipe(tokio::sync::Mutex<Option<Stream>>),
}

/// A process that runs, or whose output has not ended.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) tag: Option<String>,
    pub(crate) config: ProcessConfig,
    pub(crate) input: Input,
    followers: Mutex<Vec<mpsc::Sender<ProcessEvent>>>,
    is_reaped: Arc<AtomicBool>,
    is_signalled: AtomicBool,
    signalled: Notify,
}

impl Process {
    pub(crate) fn new(
        pid: u32,
        is_reaped: Arc<AtomicBool>,
        tag: Option<String>,
        config: ProcessConfig,
        input: Input,
    ) -> Self {
        Self {
            pid,
            tag,
            config,
            input,
            followers: Mutex::default(),
            is_reaped,
            is_signalled: AtomicBool::new(false),
            signalled: Notify::new(),
        }
    }

    /// Its events from now on.
    pub(crate) fn follow(&self) -> mpsc::Receiver<ProcessEvent> {
        // One event in transit, and one being written.
        let (sender, receiver) = mpsc::channel(1);
        lock(&self.followers).push(sender);
        receiver
    }

    /// Sends an event to all followers, waiting until each has room for it.
    pub(crate) async fn publish(&self, event: ProcessEvent) {
        let followers = lock(&self.followers).clone();
        for follower in &followers {
            // A dropped follower is removed below.
            let _ = follower.send(event.clone()).await;
        }
        lock(&self.followers).retain(|follower| !follower.is_closed());
    }

    /// Sends the last event, and removes the followers.
    pub(crate) async fn finish(&self, end: EndEvent) {
        self.publish(ProcessEvent { end: Some(end), ..ProcessEvent::default() }).await;
        lock(&self.followers).clear();
    }

    // All of these run on one thread: the flags need no ordering.
    pub(crate) fn is_signalled(&self) -> bool {
        self.is_signalled.load(Ordering::Relaxed)
    }

    pub(crate) async fn signalled(&self) {
        self.signalled.notified().await;
    }

    /// Sends a signal to its group.
    pub(crate) fn signal(&self, number: i32) -> Result<(), RpcError> {
        let signal = Signal::from_named_raw(number);
        let signal = signal.ok_or_else(|| RpcError::new(Code::Unimplemented, format_args!("no signal {number}")))?;
        if signal == Signal::KILL || signal == Signal::TERM {
            self.is_signalled.store(true, Ordering::Relaxed);
            self.signalled.notify_one();
        }
        // After it is reaped, its number still identifies its group as long as the group has
        // members. If a process has that number, it is another one, and so is its group.
        if self.is_reaped.load(Ordering::Relaxed) && Path::new(&format!("/proc/{}", self.pid)).exists() {
            return Ok(());
        }
        let sent = match i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            Some(group) => kill_process_group(group, signal).map_err(io::Error::from),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        match sent {
            Err(_) if self.is_reaped.load(Ordering::Relaxed) => Ok(()),
            sent => sent.map_err(|error| RpcError::internal(format_args!("no signal can be sent: {error}"))),
        }
    }
}

#[derive(Debug)]
struct Ended {
    pid: u32,
    tag: Option<String>,
    end: EndEvent,
    at: Instant,
}

/// The processes that clients have started.
#[derive(Debug, Default)]
pub(crate) struct Table {
    running: Mutex<HashMap<u32, Arc<Process>>>,
    ended: Mutex<Vec<Ended>>,
}

/// The result of a lookup by selector.
#[derive(Debug)]
pub(crate) enum Found {
    Running(Arc<Process>),
    Ended(u32, EndEvent),
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        lock(&self.running).len()
    }

    pub(crate) fn list(&self) -> Vec<ProcessInfo> {
        let running = lock(&self.running);
        let info = |process: &Arc<Process>| ProcessInfo {
            config: process.config.clone(),
            pid: process.pid,
            tag: process.tag.clone(),
        };
        let mut list: Vec<_> = running.values().map(info).collect();
        list.sort_by_key(|info| info.pid);
        list
    }

    pub(crate) fn insert(&self, process: &Arc<Process>) {
        // An earlier process with the same number or tag is no longer found.
        lock(&self.ended).retain(|ended| ended.pid != process.pid && (ended.tag.is_none() || ended.tag != process.tag));
        lock(&self.running).insert(process.pid, Arc::clone(process));
    }

    /// Forgets a process and remembers its end.
    pub(crate) fn end(&self, process: &Arc<Process>, end: EndEvent) {
        let mut running = lock(&self.running);
        if !running.get(&process.pid).is_some_and(|known| Arc::ptr_eq(known, process)) {
            return;
        }
        running.remove(&process.pid);
        let mut ended = lock(&self.ended);
        ended.retain(|one| one.at.elapsed() < REMEMBERED);
        if ended.len() == MAX_REMEMBERED {
            ended.remove(0);
        }
        ended.push(Ended { pid: process.pid, tag: process.tag.clone(), end, at: Instant::now() });
    }

    /// The process of `selector`, running or recently ended.
    pub(crate) fn find(&self, selector: &Selector) -> Result<Found, RpcError> {
        let matches = |pid: u32, tag: &Option<String>| match (selector.pid, &selector.tag) {
            (Some(wanted), _) => wanted == pid,
            (None, Some(wanted)) => tag.as_ref() == Some(wanted),
            (None, None) => false,
        };
        if let Some(process) = lock(&self.running).values().find(|process| matches(process.pid, &process.tag)) {
            return Ok(Found::Running(Arc::clone(process)));
        }
        let ended = lock(&self.ended);
        let recent = |one: &&Ended| one.at.elapsed() < REMEMBERED && matches(one.pid, &one.tag);
        if let Some(one) = ended.iter().rev().find(recent) {
            return Ok(Found::Ended(one.pid, one.end.clone()));
        }
        Err(match (selector.pid, &selector.tag) {
            (Some(pid), None) => RpcError::not_found(format_args!("process with pid {pid} not found")),
            (None, Some(tag)) => RpcError::not_found(format_args!("process with tag {tag} not found")),
            _ => RpcError::invalid("a process is named by its pid or by its tag"),
        })
    }

    /// The process of `selector`, if it runs.
    pub(crate) fn running(&self, selector: &Selector) -> Result<Arc<Process>, RpcError> {
        match self.find(selector)? {
            Found::Running(process) => Ok(process),
            Found::Ended(pid, _) => Err(RpcError::not_found(format_args!("process with pid {pid} not found"))),
        }
    }
}
