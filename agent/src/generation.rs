//! Changes of the VM's generation: a fork's child, a restored VM, a VM that was reset.
//!
//! The host reports the change before it releases the VM. State of the parent is dropped; processes
//! are not disturbed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clade_agent_proto::api::{Generation, Ready};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{NoArg, ioctl, opcode};

use crate::agent::Agent;
use crate::clock;
use crate::log::log;
use crate::settings::Settings;

/// Clock difference that is not corrected.
const SMALL_STEP_NS: i128 = 1_000_000;
/// RNDRESEEDCRNG: makes the kernel's generator use the entropy written to it.
const RESEED: rustix::ioctl::Opcode = opcode::none(b'R', 7);

fn reseed(entropy: &[u8]) -> io::Result<()> {
    let device = rustix::fs::open("/dev/urandom", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&device, entropy)?;
    // SAFETY: the request of that number takes no argument.
    let request = unsafe { NoArg::<RESEED>::new() };
    // SAFETY: without an argument the kernel neither reads nor writes memory of ours.
    unsafe { ioctl(&device, request) }?;
    Ok(())
}

fn set_clock(now_ns: &str) -> Result<(), String> {
    let wanted: i128 = now_ns.parse().map_err(|_| format!("{now_ns:?} is no time"))?;
    if (wanted - clock::now_ns()).abs() < SMALL_STEP_NS {
        return Ok(());
    }
    clock::set(wanted).map_err(|error| error.to_string())
}

impl Agent {
    /// Performs all steps of a change. Sets `is_kept` for the requesting connection.
    pub(crate) async fn change_generation(&self, request: Generation, is_kept: &AtomicBool) -> Ready {
        // The host waits from here on, also for an earlier request.
        let begun = Instant::now();
        let _turn = self.turn.lock().await;
        let mut ready = Ready::default();
        let mut attempt = |what: &str, done: Result<(), String>| {
            if let Err(why) = done {
                log!("{what}: {why}");
                ready.failed.push(format!("{what}: {why}"));
            }
        };
        // First, because a holder of the parent's token must be locked out from now on, and so must
        // other users until the host sets a new token.
        {
            let mut settings = self.settings();
            let envs = std::mem::take(&mut settings.envs);
            let (user, workdir) = (settings.user.clone(), settings.workdir.clone());
            let is_locked = settings.is_locked || settings.token.is_some();
            *settings = Settings { envs, user, workdir, is_locked, ..Settings::default() };
        }
        // Relaxed: only this thread reads it, when the connections wake.
        is_kept.store(true, Ordering::Relaxed);
        // All but the connection of this request.
        let ended = self.generation.receiver_count().saturating_sub(1);
        self.generation.send_modify(|generation| *generation += 1);
        ready.generation = *self.generation.borrow();
        // Only clients of the parent know them.
        self.watchers.end();
        // The console is slow, and the host waits.
        if ended > 0 {
            log!("the VM is {:?} now: {ended} connections of before are ended", request.name);
        }
        if let Some(now_ns) = &request.now_ns {
            attempt("the clock", set_clock(now_ns));
        }
        let entropy = request.entropy.as_ref().map_or(&[][..], |bytes| &bytes.0);
        attempt("the random number generator", reseed(entropy).map_err(|error| error.to_string()));
        match self.run_fork_hooks(&request, ready.generation, begun).await {
            Ok(hooks) => ready.hooks = hooks,
            Err(error) => attempt("the hooks", Err(error.to_string())),
        }
        ready
    }
}
