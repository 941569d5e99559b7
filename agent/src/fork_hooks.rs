//! Hooks of the guest: the programs in `/etc/clade/fork.d`, which run when the VM's generation changes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clade_agent_proto::api::{Generation, Hook};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::agent::Agent;
use crate::children::{Child, describe};
use crate::log::log;
use crate::program::{Program, SpawnEnv};
use crate::users;

/// The directory of hooks.
const HOOKS: &str = "/etc/clade/fork.d";
/// Maximum number of hooks.
const MAX_HOOKS: usize = 64;
/// Time for all hooks together, if the host names none. On a busy host a script of one line took more
/// than 30 s in a guest whose kernel is interpreted.
const HOOKS_TIME: Duration = Duration::from_secs(55);

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
    /// Runs the hooks for a change of the generation whose request came at `begun`.
    ///
    /// # Errors
    /// When the directory of hooks cannot be read.
    pub(crate) async fn run_fork_hooks(
        &self,
        request: &Generation,
        generation: u64,
        begun: Instant,
    ) -> io::Result<Vec<Hook>> {
        let time = request.hooks_ms.map_or(HOOKS_TIME, Duration::from_millis);
        Ok(self.run_hooks(&hooks(Path::new(HOOKS))?, (&request.name, generation), begun, time).await)
    }

    /// Runs hooks one after another, all within `time` from `begun` on, so that the answer to the host
    /// names a hook that is slow.
    async fn run_hooks(
        &self,
        hooks: &[PathBuf],
        (vm, generation): (&str, u64),
        begun: Instant,
        time: Duration,
    ) -> Vec<Hook> {
        let mut results = Vec::new();
        for path in hooks {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let left = time.saturating_sub(begun.elapsed());
            let status = if left.is_zero() {
                format!("not begun within {} s", time.as_secs_f64())
            } else {
                self.run_hook(path, vm, generation, left).await
            };
            if status != "exit status 0" {
                log!("{name} has failed: {status}");
            }
            results.push(Hook { name, status });
        }
        results
    }

    /// Runs a hook. Returns its status, or the reason why it has none.
    async fn run_hook(&self, path: &Path, vm: &str, generation: u64, time: Duration) -> String {
        let Some(user) = users::find("root") else { return "there is no root".to_owned() };
        let envs = BTreeMap::from([
            ("CLADE_VM".to_owned(), vm.replace('\0', "")),
            ("CLADE_GENERATION".to_owned(), generation.to_string()),
        ]);
        let spawn_env = SpawnEnv { user: &user, envs: &envs, workdir: None };
        let program = path.to_string_lossy();
        // The hook's output goes to the agent's log.
        let started = Program::new(&program, &[], &BTreeMap::new(), Path::new("/"), &spawn_env).and_then(|mut hook| {
            hook.no_stdin()?;
            self.children.spawn(&hook)
        });
        let Child { pid, end, .. } = match started {
            Ok(child) => child,
            Err(error) => return format!("it cannot be started: {error}"),
        };
        match tokio::time::timeout(time, end).await {
            Ok(status) => status.map_or_else(|_| "unknown".to_owned(), describe),
            Err(_) => {
                if let Some(group) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    // The group may have ended already.
                    let _ = kill_process_group(group, Signal::KILL);
                }
                format!("not done after {:.1} s", time.as_secs_f64())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use clade_test_support::write_program;

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

    #[tokio::test]
    async fn hooks_share_their_time_and_each_result_says_what_happened() {
        let dir = tempfile::tempdir().unwrap();
        let hook = |name: &str, script: &str| {
            let path = dir.path().join(name);
            write_program(&path, &format!("#!/bin/sh\n{script}\n"), 0o755);
            path
        };
        let (quick, slow) = (hook("10-quick", "exit 3"), hook("20-slow", "exec sleep 100000"));
        let agent = Agent::new().unwrap();
        let statuses = async |hooks: &[PathBuf], begun, time| {
            let results = agent.run_hooks(hooks, ("vm", 1), begun, time).await;
            results.into_iter().map(|hook| (hook.name, hook.status)).collect::<Vec<_>>()
        };
        let named = |name: &str, status: &str| (name.to_owned(), status.to_owned());
        let long = Duration::from_secs(100_000);
        let now = Instant::now();
        assert_eq!(statuses(std::slice::from_ref(&quick), now, long).await, [named("10-quick", "exit status 3")]);
        // The slow hook leaves no time for the next.
        let results = statuses(&[slow.clone(), quick], Instant::now(), Duration::from_millis(200)).await;
        assert!(results[0].1.starts_with("not "), "{results:?}");
        assert_eq!(results[1], named("10-quick", "not begun within 0.2 s"));
        // Neither has a hook more than what is left.
        let before = now.checked_sub(Duration::from_secs(5)).unwrap();
        let results = statuses(&[slow], before, Duration::from_millis(5_200)).await;
        assert!(results[0].1.starts_with("not done after 0.") || results[0].1.starts_with("not begun"), "{results:?}");
    }
}
