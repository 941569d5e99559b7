//! The VMs that are being made, and the number of VMs that a fork adds its children to.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use clade_api::NameClaim;

/// The VMs that are being made, and those that others have made.
#[derive(Debug, Default)]
pub(super) struct Launching(Mutex<LaunchingVms>);

#[derive(Debug, Default)]
struct LaunchingVms {
    /// VMs that have files, and are not announced yet.
    names: BTreeSet<String>,
    /// The number of those that have no names yet.
    unnamed: usize,
    /// The number of VMs of the directory that this supervisor has not started: of an earlier one, and of
    /// commands without one.
    of_others: usize,
}

impl Launching {
    /// With `of_others` VMs that this supervisor has not started.
    pub(super) fn beside(of_others: usize) -> Self {
        Self(Mutex::new(LaunchingVms { of_others, ..LaunchingVms::default() }))
    }

    fn vms(&self) -> MutexGuard<'_, LaunchingVms> {
        // Every change is one step.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of the VMs that are being made.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.vms().names.clone()
    }

    /// Notes the number of VMs that this supervisor has not started.
    pub(super) fn note_others(&self, count: usize) {
        self.vms().of_others = count;
    }

    /// Marks the VMs of these names as being made.
    pub(super) fn begin(&self, claims: &[NameClaim]) -> LaunchGuard<'_> {
        let mut guard = LaunchGuard { of: self, names: Vec::new(), unnamed: 0 };
        guard.name(claims);
        guard
    }

    /// Marks `count` VMs without names as being made, unless `check` refuses them. `check` is called with the number of
    /// VMs that there are: `started`, which this supervisor has started, those that are being made and those of
    /// others. Also returns the names of the former two.
    ///
    /// # Errors
    /// That of `check`.
    pub(super) fn begin_unnamed<E>(
        &self,
        count: usize,
        started: impl FnOnce() -> BTreeSet<String>,
        check: impl FnOnce(usize) -> Result<(), E>,
    ) -> Result<(LaunchGuard<'_>, BTreeSet<String>), E> {
        // Until the VMs are counted: two forks at a time do not take the same room.
        let mut vms = self.vms();
        let mut names = started();
        names.extend(vms.names.iter().cloned());
        check(names.len() + vms.unnamed + vms.of_others)?;
        vms.unnamed += count;
        Ok((LaunchGuard { of: self, names: Vec::new(), unnamed: count }, names))
    }
}

/// VMs that are being made, until this is dropped.
#[derive(Debug)]
pub(super) struct LaunchGuard<'a> {
    of: &'a Launching,
    names: Vec<String>,
    unnamed: usize,
}

impl LaunchGuard<'_> {
    /// Gives the VMs their names.
    pub(super) fn name(&mut self, claims: &[NameClaim]) {
        let mut vms = self.of.vms();
        vms.unnamed -= std::mem::take(&mut self.unnamed);
        self.names.extend(claims.iter().map(|claim| claim.name.clone()));
        vms.names.extend(self.names.iter().cloned());
    }
}

impl Drop for LaunchGuard<'_> {
    fn drop(&mut self) {
        let mut vms = self.of.vms();
        vms.unnamed -= self.unnamed;
        for name in &self.names {
            vms.names.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use clade_api::RuntimeDir;

    use super::*;

    fn at_most(limit: usize, count: usize) -> impl FnOnce(usize) -> Result<(), usize> {
        move |running| if running + count > limit { Err(running) } else { Ok(()) }
    }

    #[test]
    fn vms_of_others_and_vms_without_names_count() {
        let dir = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::open(dir.path()).unwrap();
        let started = || BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        let launching = Launching::beside(3);
        assert_eq!(launching.begin_unnamed(5, started, at_most(9, 5)).unwrap_err(), 5);
        let (mut first, listed) = launching.begin_unnamed(4, started, at_most(9, 4)).unwrap();
        assert_eq!(listed, started());
        assert_eq!(launching.begin_unnamed(1, started, at_most(9, 1)).unwrap_err(), 9, "another has the room");
        // The first of them has its name, and its process, too: it counts once.
        let claims = [NameClaim::new(&dir, "b").unwrap(), NameClaim::new(&dir, "c").unwrap()];
        first.name(&claims);
        assert_eq!(launching.names(), BTreeSet::from(["b".to_owned(), "c".to_owned()]));
        let (second, listed) = launching.begin_unnamed(1, started, at_most(9, 1)).unwrap();
        assert_eq!(listed.len(), 3);
        launching.note_others(0);
        assert_eq!(launching.begin_unnamed(1, started, at_most(4, 1)).unwrap_err(), 4);
        drop((first, second));
        drop(launching.begin(&claims));
        assert_eq!((launching.names().len(), launching.vms().unnamed), (0, 0));
        assert_eq!(launching.begin_unnamed(1, started, at_most(2, 1)).unwrap_err(), 2);
    }
}
