//! Quotas of each owner's sandboxes and snapshots. Paused ones count: their memory is in files.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::http::StatusCode;
use thiserror::Error;

use crate::error::{Answer, GatewayError};
use crate::wire::Texts;

/// Most pairs of a sandbox's metadata or variables, and most bytes of them.
const MAX_PAIRS: usize = 256;
const MAX_METADATA: usize = 16 << 10;
const MAX_VARIABLES: usize = 64 << 10;

/// Limits of each owner's sandboxes and snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Sandboxes, running or paused.
    pub sandboxes: u64,
    /// MiB of guest memory of sandboxes and snapshots.
    pub memory_mib: u64,
    /// Snapshots.
    pub snapshots: u64,
}

impl Default for Quotas {
    fn default() -> Self {
        Self { sandboxes: 500, memory_mib: 512 << 10, snapshots: 100 }
    }
}

/// The text does not name quotas.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not of the form sandboxes=N,memory=MIB,snapshots=N")]
pub struct QuotaError {
    text: String,
}

impl FromStr for Quotas {
    type Err = QuotaError;

    /// Parses quotas. Missing ones have their defaults.
    fn from_str(text: &str) -> Result<Self, QuotaError> {
        let wrong = || QuotaError { text: text.to_owned() };
        let mut quotas = Self::default();
        for part in text.split(',') {
            let (name, number) = part.split_once('=').ok_or_else(wrong)?;
            let number = number.parse().map_err(|_| wrong())?;
            match name {
                "sandboxes" => quotas.sandboxes = number,
                "memory" => quotas.memory_mib = number,
                "snapshots" => quotas.snapshots = number,
                _ => return Err(wrong()),
            }
        }
        Ok(quotas)
    }
}

impl fmt::Display for Quotas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sandboxes={},memory={},snapshots={}", self.sandboxes, self.memory_mib, self.snapshots)
    }
}

/// Use of quotas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) sandboxes: u64,
    pub(crate) mib: u64,
    pub(crate) snapshots: u64,
}

impl Usage {
    /// Returns the use of `count` sandboxes of `mib` each.
    pub(crate) fn of_sandboxes(count: usize, mib: u64) -> Self {
        let sandboxes = count as u64;
        Self { sandboxes, mib: mib.saturating_mul(sandboxes), snapshots: 0 }
    }

    pub(crate) fn of_snapshot(mib: u64) -> Self {
        Self { snapshots: 1, mib, sandboxes: 0 }
    }

    fn less(self, part: Self) -> Self {
        Self {
            sandboxes: self.sandboxes - part.sandboxes,
            mib: self.mib - part.mib,
            snapshots: self.snapshots - part.snapshots,
        }
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
            mib: self.mib.saturating_add(other.mib),
            snapshots: self.snapshots.saturating_add(other.snapshots),
        }
    }
}

/// The quotas, and their use by requests in progress.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    quotas: Quotas,
    pending: Mutex<BTreeMap<String, Usage>>,
}

/// A part of an owner's quotas, held by a request in progress.
#[derive(Debug)]
pub(crate) struct HeldQuota {
    of: Arc<Ledger>,
    owner: String,
    usage: Usage,
}

impl Ledger {
    pub(crate) fn new(quotas: Quotas) -> Self {
        Self { quotas, pending: Mutex::default() }
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<String, Usage>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes more for an owner. `recorded` counts the owner's records. Concurrent requests wait
    /// meanwhile.
    ///
    /// # Errors
    /// 429 when it exceeds a quota.
    pub(crate) fn take(
        self: &Arc<Self>,
        owner: &str,
        more: Usage,
        recorded: impl FnOnce() -> Usage,
    ) -> Answer<HeldQuota> {
        let mut pending = self.pending();
        let before = pending.get(owner).copied().unwrap_or_default();
        let after = before.and(recorded()).and(more);
        let Quotas { sandboxes, memory_mib, snapshots } = self.quotas;
        let all = [
            ("sandboxes", after.sandboxes, sandboxes, more.sandboxes),
            ("MiB of memory in sandboxes and snapshots", after.mib, memory_mib, more.mib),
            ("snapshots", after.snapshots, snapshots, more.snapshots),
        ];
        // An owner above one quota, after that was reduced, may still use the others.
        if let Some((what, after, most, _)) = all.into_iter().find(|(_, after, most, more)| *more > 0 && after > most) {
            let why = format!("{after} {what} would be more than the {most} that the key's owner may have");
            return Err(GatewayError::new(StatusCode::TOO_MANY_REQUESTS, why));
        }
        pending.insert(owner.to_owned(), before.and(more));
        Ok(HeldQuota { of: Arc::clone(self), owner: owner.to_owned(), usage: more })
    }
}

impl HeldQuota {
    /// Takes a part out of it, which is held until the result is dropped.
    pub(crate) fn split_off(&mut self, part: Usage) -> Self {
        self.usage = self.usage.less(part);
        Self { of: Arc::clone(&self.of), owner: self.owner.clone(), usage: part }
    }
}

impl Drop for HeldQuota {
    fn drop(&mut self) {
        let mut pending = self.of.pending();
        let Some(usage) = pending.get_mut(&self.owner) else { return };
        *usage = usage.less(self.usage);
        if *usage == Usage::default() {
            pending.remove(&self.owner);
        }
    }
}

fn check(what: &str, texts: Option<&Texts>, most: usize) -> Answer<()> {
    let Some(texts) = texts else { return Ok(()) };
    let bytes: usize = texts.iter().map(|(key, value)| key.len() + value.len()).sum();
    if texts.len() > MAX_PAIRS || bytes > most {
        let why = format!("{what}: {} pairs of {bytes} bytes; at most {MAX_PAIRS} of {most}", texts.len());
        return Err(GatewayError::bad(why));
    }
    Ok(())
}

/// Refuses metadata that is too long. Each record has a copy.
pub(crate) fn check_metadata(metadata: Option<&Texts>) -> Answer<()> {
    check("metadata", metadata, MAX_METADATA)
}

/// Refuses variables that are too long.
pub(crate) fn check_variables(variables: Option<&Texts>) -> Answer<()> {
    check("envVars", variables, MAX_VARIABLES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_given_back_counts_no_more_and_is_not_given_back_twice() {
        let ledger = Arc::new(Ledger::new(Quotas { sandboxes: 4, memory_mib: 100, snapshots: 1 }));
        let take = |count, recorded| {
            let recorded = || Usage::of_sandboxes(recorded, 10);
            ledger.take("one", Usage::of_sandboxes(count, 10), recorded)
        };
        let mut held = take(3, 0).unwrap();
        let parts = [(); 2].map(|()| held.split_off(Usage::of_sandboxes(1, 10)));
        assert!(take(2, 0).is_err());
        // Two have records.
        drop(parts);
        let second = take(1, 2).unwrap();
        assert!(take(1, 2).is_err());
        drop(held);
        assert_eq!(ledger.pending()["one"], Usage::of_sandboxes(1, 10));
        drop(second);
        assert!(ledger.pending().is_empty());
    }

    #[test]
    fn an_owner_has_its_quotas_and_a_refusal_takes_nothing() {
        let ledger = Arc::new(Ledger::new(Quotas { sandboxes: 4, memory_mib: 100, snapshots: 1 }));
        let take = |owner: &str, more: Usage, recorded: u64| {
            ledger.take(owner, more, || Usage::of_sandboxes(recorded as usize, 10))
        };
        let held = take("one", Usage::of_sandboxes(2, 10), 1).unwrap();
        for (more, what) in [
            (Usage::of_sandboxes(2, 10), "5 sandboxes"),
            (Usage::of_sandboxes(1, 71), "101 MiB"),
            (Usage::of_sandboxes(usize::MAX, u64::MAX), "sandboxes"),
        ] {
            let error = take("one", more, 1).unwrap_err();
            assert_eq!(error.status, StatusCode::TOO_MANY_REQUESTS);
            assert!(error.message.contains(what), "{error:?}");
        }
        let last = take("one", Usage::of_sandboxes(1, 70), 1).unwrap();
        let other = take("two", Usage::of_sandboxes(4, 25), 0).unwrap();
        drop(held);
        let snapshot = take("one", Usage::of_snapshot(5), 1).unwrap();
        assert!(take("one", Usage::of_snapshot(5), 1).unwrap_err().message.contains("2 snapshots"));
        drop((last, other, snapshot));
        assert!(ledger.pending().is_empty());
    }

    #[test]
    fn quotas_are_read_as_they_are_written() {
        let quotas = Quotas { sandboxes: 1, memory_mib: 2, snapshots: 3 };
        assert_eq!(quotas.to_string().parse(), Ok(quotas));
        assert_eq!("sandboxes=7".parse(), Ok(Quotas { sandboxes: 7, ..Quotas::default() }));
        for wrong in ["", "sandboxes", "sandboxes=", "sandboxes=-1", "memory=1G", "other=1", "sandboxes=1,"] {
            assert!(wrong.parse::<Quotas>().is_err(), "{wrong}");
        }
    }
}
