//! The end: of the agent, or of the guest if the agent is PID 1.

use std::io;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};
use rustix::system::RebootCommand;

use crate::agent::Agent;
use crate::lock::lock;
use crate::log::log;

/// Default time between SIGTERM and SIGKILL.
pub(crate) const GRACE: Duration = Duration::from_secs(5);
/// Most time that the host may give programs to end in.
const MAX_GRACE: Duration = Duration::from_secs(86_400);
const POLL: Duration = Duration::from_millis(20);

impl Agent {
    /// Requests the end. Programs have `grace` to end in.
    pub(crate) fn ask_for_end(&self, grace: Duration) {
        self.end.send_replace(Some(grace.min(MAX_GRACE)));
    }

    /// Waits until the end is requested. Returns the time that programs have to end in.
    pub(crate) async fn end(&self) -> Duration {
        // The sender belongs to `self`, and so is not dropped.
        let asked = self.end.subscribe().wait_for(Option::is_some).await.map(|grace| *grace);
        asked.ok().flatten().unwrap_or(GRACE)
    }

    /// Ends the entrypoint in order: other programs may be its own, and must not end before it.
    async fn end_entrypoint(&self, grace: Duration) {
        let entrypoint = || *lock(&self.entrypoint);
        let Some((pid, signal)) = entrypoint() else { return };
        // SAFETY: the call takes two numbers and touches no memory. The signal may be a real-time one, which rustix
        // does not name.
        unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) };
        let begun = Instant::now();
        while begun.elapsed() < grace && entrypoint().is_some() {
            tokio::time::sleep(POLL).await;
        }
    }

    /// Ends the processes that clients have started, in order.
    pub(crate) async fn end_processes(&self, grace: Duration) {
        let list = self.processes.list();
        let groups: Vec<Pid> = list.iter().filter_map(|info| Pid::from_raw(i32::try_from(info.pid).ok()?)).collect();
        let send = |signal| {
            for group in &groups {
                // The group may have ended already.
                let _ = kill_process_group(*group, signal);
            }
        };
        send(Signal::TERM);
        let begun = Instant::now();
        while begun.elapsed() < grace && groups.iter().any(|group| test_kill_process_group(*group).is_ok()) {
            tokio::time::sleep(POLL).await;
        }
        send(Signal::KILL);
    }
}

/// Whether this is the only process of user space.
fn is_alone() -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return true };
    let own = std::process::id();
    let mut others = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // Kernel threads and zombies have no program.
    !others.any(|pid| pid != own && std::fs::read_link(format!("/proc/{pid}/exe")).is_ok())
}

/// Ends all other processes, the agent being PID 1. They have `grace` to end in order.
pub(crate) async fn end_programs(grace: Duration) {
    let all = |signal| Pid::from_raw(-1).map(|all| kill_process(all, signal));
    // There may be no processes.
    let _ = all(Signal::TERM);
    await_alone(grace).await;
    let _ = all(Signal::KILL);
    await_alone(GRACE).await;
}

async fn await_alone(limit: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < limit && !is_alone() {
        tokio::time::sleep(POLL).await;
    }
}

/// Ends all processes, syncs all files to the disk, and resets the machine. That ends a VM of
/// Clade, even if the kernel cannot switch it off and would halt instead.
pub(crate) async fn end_guest(agent: &Agent, grace: Duration) -> io::Error {
    log!("the guest ends");
    let begun = Instant::now();
    agent.end_entrypoint(grace).await;
    // The host cuts the power when its time is over, and files are synced before.
    end_programs(grace.saturating_sub(begun.elapsed())).await;
    rustix::fs::sync();
    match rustix::system::reboot(RebootCommand::Restart) {
        Ok(()) => io::Error::other("the guest goes on after its end"),
        Err(error) => error.into(),
    }
}
