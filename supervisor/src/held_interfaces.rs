//! Claims on interfaces with several queues, held until the process of their VM has ended or they are gone.
//!
//! The process has claims of its own, and a compromised one can drop them and keep its queues. The next VM of such an
//! interface would share its packets with that process. A supervisor does not have the claims of VMs that an earlier
//! one has started.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Supervisor, intervals};
use crate::vm_record::VmRecord;
use clade_api::DaemonError;
use clade_vmm::vm::InterfaceClaim;
use clade_worker::has_ended;

/// Time limit for the ends of processes that have an interface which is wanted.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The interfaces of one VM.
#[derive(Debug)]
struct Held {
    name: String,
    pid: u32,
    process: OwnedFd,
    claims: Vec<InterfaceClaim>,
}

/// The interfaces of all VMs.
#[derive(Debug, Default)]
pub(super) struct HeldInterfaces(Mutex<Vec<Held>>);

impl HeldInterfaces {
    fn all(&self) -> MutexGuard<'_, Vec<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the claims until `process` has ended, which has the `pid` and makes the VM called `name`.
    pub(super) fn hold(&self, name: &str, pid: u32, process: OwnedFd, claims: Vec<InterfaceClaim>) {
        if !claims.is_empty() {
            self.all().push(Held { name: name.to_owned(), pid, process, claims });
        }
    }

    /// Drops the claims of processes that have ended.
    pub(super) fn release_ended(&self) {
        self.all().retain(|held| !has_ended(&held.process, Duration::ZERO));
    }

    /// Returns the VMs that have one of these interfaces, with their pids. Drops claims on interfaces that are gone.
    fn holders(&self, interfaces: &[&str]) -> Vec<(String, u32)> {
        self.release_ended();
        let mut all = self.all();
        let is_meant = |claim: &InterfaceClaim| interfaces.contains(&claim.interface());
        all.iter_mut().for_each(|held| held.claims.retain(|claim| !(is_meant(claim) && claim.is_over())));
        let holders = all.iter().filter(|held| held.claims.iter().any(is_meant));
        holders.map(|held| (held.name.clone(), held.pid)).collect()
    }
}

impl Supervisor {
    /// Waits for the ends of processes that have these interfaces and no VM any more, up to [`TIMEOUT`]: such a process
    /// may wait for others, which the launch may be. An interface that is not free is refused later.
    ///
    /// # Errors
    /// When `check` refuses to go on.
    pub(super) fn await_interfaces(
        &self,
        interfaces: &[&str],
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<(), DaemonError> {
        if interfaces.is_empty() {
            return Ok(());
        }
        let has_left = |name: &str, pid| {
            self.0.processes.gave_back(pid)
                || VmRecord::read_of(&self.0.dir, name, pid).is_ok_and(|record| record.is_none())
        };
        let until = Instant::now() + TIMEOUT;
        for interval in intervals() {
            let holders = self.0.interfaces.holders(interfaces);
            if !holders.iter().any(|(name, pid)| has_left(name, *pid)) || Instant::now() > until {
                break;
            }
            check()?;
            thread::sleep(interval);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clade_test_support::{TapName, wait_until};
    use clade_vmm::vm::{Endpoints, IdentityError, NetSpec, VmConfig};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    /// The process of the VM drops its claim, and keeps its queues.
    #[test]
    fn an_interface_with_several_queues_is_taken_while_its_process_has_them() {
        let (shared, single) = (TapName::take(), TapName::take());
        let net = |tap: &TapName, queues| NetSpec { queues, ..NetSpec::new(&tap.name()) };
        let mut config = VmConfig::bare(32 << 20, 1).unwrap();
        config.nets = vec![net(&shared, 2), net(&single, 1)];
        let mut ends = match Endpoints::boot(&config) {
            Err(IdentityError::Tap(error)) => return clade_test_support::skip("tap", &error.to_string()),
            taken => taken.unwrap(),
        };
        let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&sleeper), PidfdFlags::empty()).unwrap();
        let held = HeldInterfaces::default();
        held.hold("web", sleeper.id(), pidfd, ends.take_interface_claims());
        // Queues come first.
        let mut queues = ends.hand_over(None).unwrap().1;
        queues.truncate(2);
        assert_eq!(held.holders(&[&shared.name()]), [("web".to_owned(), sleeper.id())]);
        assert_eq!(held.holders(&[&single.name()]), []);
        let refused = Endpoints::boot(&config).unwrap_err();
        assert!(matches!(&refused, IdentityError::Taken { value, .. } if *value == shared.name()), "{refused}");
        drop(queues);
        // Programs that other tests start have them until they are executed.
        wait_until("the interface to go", || held.holders(&[&shared.name()]).is_empty());
        let mut again = Endpoints::boot(&config).unwrap();
        let pidfd = pidfd_open(Pid::from_child(&sleeper), PidfdFlags::empty()).unwrap();
        held.hold("web", sleeper.id(), pidfd, again.take_interface_claims());
        assert_eq!(held.holders(&[&shared.name()]).len(), 1);
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert_eq!(held.holders(&[&shared.name()]), []);
    }
}
