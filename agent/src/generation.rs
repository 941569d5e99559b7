//! Changes of the VM's generation: a fork's child, a restored VM, a VM that was reset.
//!
//! The host reports the change before it releases the VM. State of the parent is dropped; processes
//! are not disturbed.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clade_agent_proto::api::{Generation, Hook, Ready};
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{NoArg, ioctl, opcode};
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;

use crate::agent::Agent;
use crate::children::describe;
use crate::clock;
use crate::log::log;
use crate::process::spawn::{SpawnEnv, command};
use crate::settings::Settings;
use crate::users;

/// The directory of hooks.
const HOOKS: &str = "/etc/clade/fork.d";
/// Maximum number of hooks.
const MAX_HOOKS: usize = 64;
/// Timeout of each hook: less than the host waits for a single VM's answer, so that the answer names
/// the hook. On a busy host a script of one line took more than 30 s in a guest whose kernel is
/// interpreted.
const HOOK_TIMEOUT: Duration = Duration::from_secs(55);
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

/// The executable hooks, by name.
fn hooks(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    found.retain(|path| fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0));
    found.sort();
    found.truncate(MAX_HOOKS);
    Ok(found)
}

impl Agent {
    /// Performs all steps of a change. Sets `is_kept` for the requesting connection.
    pub(crate) async fn change_generation(&self, request: Generation, is_kept: &AtomicBool) -> Ready {
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
        self.generation.send_modify(|generation| *generation += 1);
        ready.generation = *self.generation.borrow();
        log!("the VM is {:?} now: calls of before are ended", request.name);
        if let Some(now_ns) = &request.now_ns {
            attempt("the clock", set_clock(now_ns));
        }
        let entropy = request.entropy.unwrap_or_default();
        attempt("the random number generator", reseed(&entropy.0).map_err(|error| error.to_string()));
        match hooks(Path::new(HOOKS)) {
            Ok(hooks) => {
                for hook in hooks {
                    let hook = self.run_hook(&hook, &request.name, ready.generation).await;
                    if hook.status != "exit status 0" {
                        log!("{} has failed: {}", hook.name, hook.status);
                    }
                    ready.hooks.push(hook);
                }
            }
            Err(error) => attempt("the hooks", Err(error.to_string())),
        }
        ready
    }

    async fn run_hook(&self, path: &Path, vm: &str, generation: u64) -> Hook {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(user) = users::find("root") else { return Hook { name, status: "there is no root".into() } };
        let envs = BTreeMap::from([
            ("CLADE_VM".to_owned(), vm.replace('\0', "")),
            ("CLADE_GENERATION".to_owned(), generation.to_string()),
        ]);
        let spawn_env = SpawnEnv { user: &user, envs: &envs, workdir: None };
        let program = path.to_string_lossy();
        let mut command = command(&program, &[], &BTreeMap::new(), Path::new("/"), &spawn_env, false);
        // The hook's output goes to the agent's log.
        command.stdin(Stdio::null()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
        let (pid, end) = match self.children.spawn(&mut command) {
            Ok(child) => child,
            Err(error) => return Hook { name, status: format!("it cannot be started: {error}") },
        };
        let status = match tokio::time::timeout(HOOK_TIMEOUT, end).await {
            Ok(status) => status.map_or_else(|_| "unknown".to_owned(), describe),
            Err(_) => {
                if let Some(group) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    // The group may have ended already.
                    let _ = kill_process_group(group, Signal::KILL);
                }
                format!("not done after {} s", HOOK_TIMEOUT.as_secs())
            }
        };
        Hook { name, status }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_are_files_that_may_be_run_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o700), ("30-readme", 0o644)] {
            fs::write(dir.path().join(name), "").unwrap();
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(dir.path().join("40-dir")).unwrap();
        let found = hooks(dir.path()).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["10-a", "20-b"]);
        assert!(hooks(&dir.path().join("none")).unwrap().is_empty());
    }
}
