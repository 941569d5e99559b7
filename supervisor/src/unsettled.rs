//! VMs whose names were taken when they ended: by the request that made them, or by one that
//! looks for a free name.

use std::sync::{Mutex, MutexGuard, PoisonError};

use clade_api::WorkerExit;
use clade_api::flight::FlightEvent;

/// The end of a VM whose files are still there.
#[derive(Debug)]
pub(super) struct UnsettledEnd {
    pub(super) name: String,
    pub(super) exit: WorkerExit,
    pub(super) was_orderly: bool,
    pub(super) flight: Vec<FlightEvent>,
}

/// The ends to be settled.
#[derive(Debug, Default)]
pub(super) struct UnsettledEnds(Mutex<Vec<UnsettledEnd>>);

impl UnsettledEnds {
    fn all(&self) -> MutexGuard<'_, Vec<UnsettledEnd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, end: UnsettledEnd) {
        self.all().push(end);
    }

    /// Returns the last end of a VM of the name. Earlier ones of the name are over.
    pub(super) fn take(&self, name: &str) -> Option<UnsettledEnd> {
        let mut all = self.all();
        let mut found = None;
        for end in std::mem::take(&mut *all) {
            if end.name == name { found = Some(end) } else { all.push(end) }
        }
        found
    }

    /// Settles the ends whose names can be claimed. Forgets those that are not open any more according to
    /// `is_open`; the others wait.
    pub(super) fn settle<C, E>(
        &self,
        is_open: impl Fn(&UnsettledEnd) -> bool,
        claim: impl Fn(&str) -> Result<C, E>,
        settle: impl Fn(C, UnsettledEnd),
    ) {
        // Not under the lock: files are read.
        let ends = std::mem::take(&mut *self.all());
        for end in ends.into_iter().filter(is_open) {
            match claim(&end.name) {
                Ok(claim) => settle(claim, end),
                Err(_) => self.push(end),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn end(name: &str, pid: u32) -> UnsettledEnd {
        let exit = WorkerExit { pid, signal: None, code: Some(0) };
        UnsettledEnd { name: name.to_owned(), exit, was_orderly: true, flight: Vec::new() }
    }

    #[test]
    fn an_end_waits_while_its_name_is_taken_and_is_settled_once() {
        let ends = UnsettledEnds::default();
        ends.push(end("a", 1));
        ends.push(end("b", 2));
        ends.push(end("over", 3));
        let settled = RefCell::new(Vec::new());
        let settle = |taken: &str| {
            let claim = |name: &str| if name == taken { Err(()) } else { Ok(()) };
            ends.settle(|end| end.name != "over", claim, |(), end| settled.borrow_mut().push((end.name, end.exit.pid)));
        };
        settle("a");
        assert_eq!(*settled.borrow(), [("b".to_owned(), 2)]);
        settle("a");
        settle("");
        settle("");
        assert_eq!(*settled.borrow(), [("b".to_owned(), 2), ("a".to_owned(), 1)]);
    }

    #[test]
    fn the_last_end_of_a_name_is_taken_and_the_earlier_ones_go() {
        let ends = UnsettledEnds::default();
        [("a", 1), ("b", 2), ("a", 3)].into_iter().for_each(|(name, pid)| ends.push(end(name, pid)));
        assert_eq!(ends.take("a").map(|end| end.exit.pid), Some(3));
        assert!(ends.take("a").is_none());
        assert_eq!(ends.take("b").map(|end| end.exit.pid), Some(2));
    }
}
