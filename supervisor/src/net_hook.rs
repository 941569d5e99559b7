//! The host's program that connects VMs' interfaces to its network.
//!
//! | variable | value |
//! |---|---|
//! | `CLADE_EVENT` | `up`: the interface is made, and the VM does not run yet. `down`: the VM has ended |
//! | `CLADE_VM` | the VM's name |
//! | `CLADE_TAP`, `CLADE_MAC` | the interface, and the guest's address |
//! | `CLADE_PARENT` | the VM or checkpoint that it was forked from; not set for one that was booted |
//!
//! The program is run once for each interface, without a shell, and has [`TIME_LIMIT`]. If `up`
//! fails, the request fails for all its VMs (I13), and the interfaces already up are taken down. A
//! failure of `down` is only logged. No `up` begins before a pending `down` has ended: the name and
//! the interface may be the same.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::signals::with_default_signals;
use clade_api::HookError;
use clade_vmm::vm::Identity;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process_group};

/// Time limit of one run.
const TIME_LIMIT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Runs of pending `down`s, each for as long as it may take, that an `up` waits for.
const AWAITED_DOWNS: u32 = 6;
/// Bytes read from the end of its standard error.
const MAX_SAID: u64 = 4096;

/// The interfaces of one VM.
#[derive(Clone, Debug)]
pub(super) struct Interfaces {
    pub(super) vm: String,
    pub(super) parent: Option<String>,
    /// Name and address of each.
    nets: Vec<(String, String)>,
}

impl Interfaces {
    /// Returns those that `is_used` does not name.
    pub(super) fn without(mut self, mut is_used: impl FnMut(&str) -> bool) -> Self {
        self.nets.retain(|(tap, _)| !is_used(tap));
        self
    }

    pub(super) fn of(vm: &str, parent: Option<&str>, identity: &Identity) -> Self {
        // A network by passt has no interface.
        let own = identity.nets.iter().filter(|net| !net.tap.is_empty());
        let nets = own.map(|net| (net.tap.clone(), net.mac.to_string())).collect();
        Self { vm: vm.to_owned(), parent: parent.map(str::to_owned), nets }
    }
}

#[derive(Debug)]
struct HookShared {
    program: PathBuf,
    limit: Duration,
    /// Interfaces still to be taken down.
    downs: Mutex<usize>,
    none_left: Condvar,
}

/// The program, and its pending `down`s. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub(super) struct NetHook {
    shared: Arc<HookShared>,
    downs: Sender<(Awaited, Interfaces)>,
}

impl NetHook {
    /// # Errors
    /// When the program is missing, or no thread is left.
    pub(super) fn new(program: &Path) -> Result<Self, Box<HookError>> {
        Self::with_limit(program, TIME_LIMIT)
    }

    fn with_limit(program: &Path, limit: Duration) -> Result<Self, Box<HookError>> {
        let failed = |source| Box::new(HookError::Start { program: program.to_owned(), source });
        let found = std::fs::metadata(program).map_err(failed)?;
        if !found.is_file() {
            return Err(failed(io::Error::other("it is no file")));
        }
        let (downs, waiting) = mpsc::channel::<(Awaited, Interfaces)>();
        let shared = Arc::new(HookShared {
            program: program.to_owned(),
            limit,
            downs: Mutex::default(),
            none_left: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let take_down = move || {
            while let Ok((awaited, interfaces)) = waiting.recv() {
                of_thread.take_down(&interfaces, interfaces.nets.len());
                drop(awaited);
            }
        };
        thread::Builder::new().name("clade-net-hook".to_owned()).spawn(take_down).map_err(failed)?;
        Ok(Self { shared, downs })
    }

    /// Connects the interfaces of VMs that do not run yet: all of them or none. Dropping the result
    /// takes them down, unless it is kept.
    ///
    /// # Errors
    /// When the program fails.
    pub(super) fn up(&self, all: Vec<Interfaces>) -> Result<Up, Box<HookError>> {
        if all.iter().all(|interfaces| interfaces.nets.is_empty()) {
            return Ok(Up { hook: self.clone(), all: Vec::new() });
        }
        let limit = AWAITED_DOWNS * self.shared.limit;
        let waited = self.shared.none_left.wait_timeout_while(self.shared.downs(), limit, |left| *left > 0);
        let (downs, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            let (program, left, seconds) = (self.shared.program.clone(), *downs, limit.as_secs());
            return Err(Box::new(HookError::Busy { program, left, seconds }));
        }
        drop(downs);
        let mut up = Up { hook: self.clone(), all: Vec::with_capacity(all.len()) };
        for interfaces in all {
            for (at, net) in interfaces.nets.iter().enumerate() {
                if let Err(error) = self.shared.run("up", &interfaces, net) {
                    // The earlier ones and the failed one, which may be half done.
                    self.shared.take_down(&interfaces, at + 1);
                    return Err(error);
                }
            }
            up.all.push(interfaces);
        }
        Ok(up)
    }

    /// Announces that interfaces will be taken down: no `up` begins until that is done, or the result is dropped.
    pub(super) fn begin_down(&self) -> PendingDown {
        PendingDown { awaited: Awaited::new(&self.shared), downs: self.downs.clone() }
    }

    /// Has the interfaces of a VM that has ended taken down, some time later.
    fn down(&self, interfaces: Interfaces) {
        self.begin_down().of(interfaces);
    }
}

/// A `down` of interfaces that are not known yet.
#[derive(Debug)]
pub(super) struct PendingDown {
    awaited: Awaited,
    downs: Sender<(Awaited, Interfaces)>,
}

impl PendingDown {
    /// Has the interfaces of a VM that has ended taken down, some time later.
    pub(super) fn of(self, interfaces: Interfaces) {
        if !interfaces.nets.is_empty() {
            // The thread runs as long as there is a sender.
            let _ = self.downs.send((self.awaited, interfaces));
        }
    }
}

/// Interfaces to be taken down, in the count for which an `up` waits, until the drop.
#[derive(Debug)]
struct Awaited(Arc<HookShared>);

impl Awaited {
    fn new(shared: &Arc<HookShared>) -> Self {
        *shared.downs() += 1;
        Self(Arc::clone(shared))
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        *self.0.downs() -= 1;
        self.0.none_left.notify_all();
    }
}

/// Connected interfaces of VMs that are still being made.
#[derive(Debug)]
pub(super) struct Up {
    hook: NetHook,
    all: Vec<Interfaces>,
}

impl Up {
    /// Keeps the interfaces: the VMs run.
    pub(super) fn keep(mut self) {
        self.all.clear();
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.all.drain(..).for_each(|interfaces| self.hook.down(interfaces));
    }
}

impl HookShared {
    fn downs(&self) -> MutexGuard<'_, usize> {
        self.downs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the first `count` interfaces down.
    fn take_down(&self, interfaces: &Interfaces, count: usize) {
        for net in &interfaces.nets[..count] {
            if let Err(error) = self.run("down", interfaces, net) {
                tracing::warn!(error = clade_vmm::error_chain(error.as_ref()), "an interface is not taken down");
            }
        }
    }

    fn run(&self, event: &str, interfaces: &Interfaces, (tap, mac): &(String, String)) -> Result<(), Box<HookError>> {
        let failed = |source| Box::new(HookError::Start { program: self.program.clone(), source });
        // Not a pipe: processes that it starts may keep its standard error open.
        let mut said = File::from(memfd_create("clade-net-hook", MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?);
        let mut command = Command::new(&self.program);
        command
            .env("CLADE_EVENT", event)
            .env("CLADE_VM", &interfaces.vm)
            .env("CLADE_TAP", tap)
            .env("CLADE_MAC", mac)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said.try_clone().map_err(failed)?)
            // A kill reaches all processes that it has started.
            .process_group(0);
        match &interfaces.parent {
            Some(parent) => command.env("CLADE_PARENT", parent),
            None => command.env_remove("CLADE_PARENT"),
        };
        let begun = Instant::now();
        let mut child = with_default_signals(&mut command).spawn().map_err(failed)?;
        let status = wait(&mut child, self.limit).map_err(failed)?;
        tracing::debug!(event, vm = interfaces.vm, tap, took = ?begun.elapsed(), ?status, "net hook");
        let how = match status {
            Some(status) if status.success() => return Ok(()),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, signal) => format!("signal {}", signal.unwrap_or_default()),
            },
            None => format!("not ended within {:?}", self.limit),
        };
        let (program, vm, tap) = (self.program.clone(), interfaces.vm.clone(), tap.clone());
        Err(Box::new(HookError::Failed { program, vm, tap, how, said: last_line(&mut said) }))
    }
}

/// Waits for the end of a program, and kills it with its process group after `limit`.
fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() > deadline {
            if let Some(group) = Pid::from_raw(child.id() as i32) {
                let _ = kill_process_group(group, Signal::KILL);
            }
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns the last line of a program's output that is not empty.
fn last_line(said: &mut File) -> String {
    let mut bytes = Vec::new();
    let length = said.metadata().map_or(0, |found| found.len());
    let read = said.seek(SeekFrom::Start(length.saturating_sub(MAX_SAID))).and_then(|_| said.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(if read.is_ok() { &bytes } else { &[] });
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clade_devices::virtio::net::Mac;
    use clade_test_support::{wait_eq, write_program};
    use clade_vmm::vm::NetIdentity;

    use super::*;

    /// A hook that logs its variables, and fails for one interface.
    fn hook(dir: &Path, more: &str) -> PathBuf {
        let (path, log) = (dir.join("hook"), dir.join("log"));
        let line = r#"echo "$CLADE_EVENT $CLADE_VM $CLADE_TAP $CLADE_MAC ${CLADE_PARENT-none}""#;
        write_program(&path, &format!("#!/bin/sh\n{line} >>{}\n{more}\n", log.display()), 0o755);
        path
    }

    /// The program with more time than a test has.
    fn patient(program: &Path) -> NetHook {
        NetHook::with_limit(program, Duration::from_secs(24 * 3600)).unwrap()
    }

    fn interfaces(vm: &str, parent: Option<&str>, taps: &[&str]) -> Interfaces {
        let mac: Mac = "02:00:00:00:00:01".parse().unwrap();
        let nets = taps.iter().map(|tap| NetIdentity { tap: (*tap).to_owned(), mac }).collect();
        Interfaces::of(vm, parent, &Identity { nets, vsock: None })
    }

    fn log(dir: &Path) -> Vec<String> {
        fs::read_to_string(dir.join("log")).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Waits until no interface is to be taken down.
    fn taken_down(hook: &NetHook) {
        wait_eq("interfaces are still to be taken down", &0, || *hook.shared.downs());
    }

    #[test]
    fn each_interface_is_connected_before_and_taken_down_after() {
        let dir = tempfile::tempdir().unwrap();
        let hook = patient(&hook(dir.path(), ""));
        let web = interfaces("web", None, &["tap0", "tap1"]);
        hook.up(vec![web.clone(), interfaces("web-1", Some("web"), &["tap2"])]).unwrap().keep();
        let mac = "02:00:00:00:00:01";
        let up =
            [format!("up web tap0 {mac} none"), format!("up web tap1 {mac} none"), format!("up web-1 tap2 {mac} web")];
        assert_eq!(log(dir.path()), up);
        hook.down(web);
        hook.down(interfaces("no-net", None, &[]));
        // An interface of that name is connected after the earlier one was taken down.
        hook.up(vec![interfaces("web", None, &["tap0"])]).unwrap().keep();
        let after = &log(dir.path())[3..];
        let down = [format!("down web tap0 {mac} none"), format!("down web tap1 {mac} none"), up[0].clone()];
        assert_eq!(after, down);
    }

    #[test]
    fn one_that_fails_takes_all_down_and_is_named_with_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let fails = "[ $CLADE_EVENT$CLADE_TAP != upbad ] || { echo why >&2; echo 'no address left' >&2; exit 3; }";
        let hook = patient(&hook(dir.path(), fails));
        let all = [("a", "tap0"), ("b", "bad"), ("c", "tap2")].map(|(vm, tap)| interfaces(vm, None, &[tap]));
        let refused = hook.up(all.into()).map(drop).unwrap_err().to_string();
        assert!(refused.ends_with("bad of b: exit code 3: no address left"), "{refused}");
        taken_down(&hook);
        let events: Vec<String> = log(dir.path()).iter().map(|line| line[..line.len() - 23].to_owned()).collect();
        assert_eq!(events, ["up a tap0", "up b bad", "down b bad", "down a tap0"]);
        // A request that fails later.
        drop(hook.up(vec![interfaces("a", None, &["tap0"])]).unwrap());
        taken_down(&hook);
        assert!(log(dir.path()).last().unwrap().starts_with("down a tap0"));
    }

    #[test]
    fn no_interface_comes_up_while_another_is_to_go_down() {
        let dir = tempfile::tempdir().unwrap();
        // A `down` takes a while, and says when it is done.
        let slow =
            format!("[ $CLADE_EVENT = up ] || {{ sleep 0.3; echo done >>{}; }}", dir.path().join("log").display());
        let hook = patient(&hook(dir.path(), &slow));
        let all = || vec![interfaces("b", None, &["tap0"])];
        let (pending, unused) = (hook.begin_down(), hook.begin_down());
        std::thread::scope(|scope| {
            let up = scope.spawn(|| hook.up(all()).unwrap().keep());
            // Which of them is not known yet.
            drop(unused);
            std::thread::sleep(Duration::from_millis(50));
            assert!(!up.is_finished() && !dir.path().join("log").exists());
            pending.of(interfaces("a", None, &["tap0"]));
            up.join().unwrap();
        });
        let log = log(dir.path());
        let events: Vec<&str> = log.iter().map(|line| line.split(" 02:").next().unwrap()).collect();
        assert_eq!(events, ["down a tap0", "done", "up b tap0"]);
    }

    #[test]
    fn a_vm_without_interfaces_waits_for_no_hook() {
        let dir = tempfile::tempdir().unwrap();
        let hook = NetHook::with_limit(&hook(dir.path(), "true"), Duration::from_millis(1)).unwrap();
        let pending = hook.begin_down();
        let busy = hook.up(vec![interfaces("a", None, &["tap0"])]).map(drop).unwrap_err();
        assert!(matches!(*busy, HookError::Busy { left: 1, .. }), "{busy}");
        hook.up(vec![interfaces("b", None, &[]), interfaces("c", None, &[])]).unwrap();
        drop(pending);
    }

    #[test]
    fn the_hook_has_default_signals_under_a_starter_that_ignores_and_blocks_some() {
        // `env` starts this program again, which starts the hook.
        const HOOK: &str = "CLADE_TEST_HOOK_OF_DEFAULT_SIGNALS";
        if let Some(hook) = std::env::var_os(HOOK) {
            let hook = patient(Path::new(&hook));
            return hook.up(vec![interfaces("web", None, &["tap0"])]).unwrap().keep();
        }
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        let hook = hook(dir.path(), &format!("exec cat /proc/self/status >{}", status.display()));
        let mut command = Command::new("env");
        command.args(["--ignore-signal=HUP,TERM", "--block-signal=USR1"]).arg(std::env::current_exe().unwrap());
        let name = "net_hook::tests::the_hook_has_default_signals_under_a_starter_that_ignores_and_blocks_some";
        let done = command.args(["--exact", name]).env(HOOK, hook).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        let status = fs::read_to_string(status).unwrap();
        for signals in ["SigIgn:\t0000000000000000", "SigBlk:\t0000000000000000"] {
            assert!(status.contains(signals), "{signals} in {status}");
        }
    }

    #[test]
    fn one_that_does_not_end_is_killed_and_one_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = hook(dir.path(), "echo waits >&2; sleep 100000");
        let mut limit = Duration::from_millis(300);
        loop {
            let hook = NetHook::with_limit(&path, limit).unwrap();
            let refused = hook.up(vec![interfaces("a", None, &["tap0"])]).map(drop).unwrap_err().to_string();
            assert!(refused.contains(&format!("not ended within {limit:?}")), "{refused}");
            if refused.ends_with(": waits") {
                break;
            }
            // A busy machine may need more than the program's time for its first output.
            limit *= 2;
        }
        for none in [dir.path().join("none"), dir.path().to_owned()] {
            let refused = NetHook::new(&none).map(drop).unwrap_err();
            assert!(matches!(*refused, HookError::Start { .. }));
        }
        fs::write(dir.path().join("text"), "no program").unwrap();
        let text = NetHook::new(&dir.path().join("text")).unwrap();
        let refused = text.up(vec![interfaces("a", None, &["tap0"])]).map(drop).unwrap_err();
        assert!(matches!(*refused, HookError::Start { .. }));
    }
}
