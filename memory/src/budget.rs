//! The budget of memory mappings: `vm.max_map_count` is shared by every VM of a process, and
//! exceeding it half-way through a fork is the one failure that cannot be undone. So mappings are
//! reserved before they are made (D5).

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use thiserror::Error;

/// The kernel's default, where /proc cannot be read.
const DEFAULT_MAX_MAP_COUNT: u64 = 65_530;
/// Reserve for other mappings than guest memory: binaries, heaps, thread stacks, vCPU state.
const RESERVE: u64 = 4_096;

/// Refused: the mappings would exceed the budget.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{asked} more mappings do not fit: {used} of {limit} are in use (vm.max_map_count less a reserve)")]
pub struct BudgetError {
    /// Requested mappings.
    pub asked: u64,
    /// Mappings in use.
    pub used: u64,
    /// The limit.
    pub limit: u64,
}

/// Mappings in use and allowed, over all VMs and stores of the process.
#[derive(Debug)]
pub struct MappingBudget {
    /// Mappings promised by this store.
    used: Arc<AtomicU64>,
    /// Mappings promised by all stores together, to compare with the limit.
    total: Arc<AtomicU64>,
    limit: u64,
}

impl MappingBudget {
    pub(crate) fn of_this_process(max_mappings: Option<u64>) -> Self {
        static TOTAL: LazyLock<Arc<AtomicU64>> = LazyLock::new(Arc::default);
        let max = fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|s| s.trim().parse().ok());
        let kernel = max.unwrap_or(DEFAULT_MAX_MAP_COUNT).saturating_sub(RESERVE);
        let limit = max_mappings.map_or(kernel, |most| most.min(kernel));
        Self { used: Arc::default(), total: Arc::clone(&TOTAL), limit }
    }

    #[cfg(test)]
    pub(crate) fn with_limit(limit: u64) -> Self {
        Self { used: Arc::default(), total: Arc::default(), limit }
    }

    /// Another store's share of the same budget.
    #[cfg(test)]
    fn beside(&self) -> Self {
        Self { used: Arc::default(), total: Arc::clone(&self.total), limit: self.limit }
    }

    /// Mappings promised by this store now.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Mappings that can still be promised, to any store.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.limit.saturating_sub(self.total.load(Ordering::Relaxed))
    }

    /// Maximum number of promised mappings.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Maximum number for another VM: a share of the rest, so that the thousandth clone still finds
    /// room.
    pub(crate) fn fair_share(&self) -> u64 {
        const MOST: u64 = 1_024;
        const LEAST: u64 = 4;
        (self.left() / 16).clamp(LEAST, MOST)
    }

    /// Promises `count` mappings, until the promise is dropped.
    pub(crate) fn promise(&self, count: u64) -> Result<Promise, BudgetError> {
        let (used, total) = (Arc::clone(&self.used), Arc::clone(&self.total));
        let mut promise = Promise { used, total, count: 0, limit: self.limit };
        promise.resize(count)?;
        Ok(promise)
    }
}

/// Mappings reserved for a region.
#[derive(Debug)]
pub(crate) struct Promise {
    used: Arc<AtomicU64>,
    total: Arc<AtomicU64>,
    count: u64,
    limit: u64,
}

impl Promise {
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Changes the number; refused without a change if the budget lacks room.
    pub(crate) fn resize(&mut self, count: u64) -> Result<(), BudgetError> {
        if count <= self.count {
            // Relaxed: the budget is a count and publishes no memory.
            self.total.fetch_sub(self.count - count, Ordering::Relaxed);
            self.used.fetch_sub(self.count - count, Ordering::Relaxed);
        } else {
            let asked = count - self.count;
            self.total
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                    used.checked_add(asked).filter(|sum| *sum <= self.limit)
                })
                .map_err(|used| BudgetError { asked, used, limit: self.limit })?;
            self.used.fetch_add(asked, Ordering::Relaxed);
        }
        self.count = count;
        Ok(())
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.total.fetch_sub(self.count, Ordering::Relaxed);
        self.used.fetch_sub(self.count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d5_all_stores_of_a_process_share_one_budget() {
        let stores = [crate::Store::open_small().unwrap(), crate::Store::open_small().unwrap()];
        let [one, other] = [stores[0].budget(), stores[1].budget()];
        let promise = one.promise(1_000).unwrap();
        // Other tests may have promised more.
        assert!(other.left() + 1_000 <= other.limit(), "{} of {} are left", other.left(), other.limit());
        assert_eq!((one.used(), other.used()), (1_000, 0));
        drop(promise);
    }

    #[test]
    fn a_limit_of_the_users_is_never_above_the_kernels() {
        let kernel = MappingBudget::of_this_process(None).limit();
        assert_eq!(MappingBudget::of_this_process(Some(u64::MAX)).limit(), kernel);
        assert_eq!(MappingBudget::of_this_process(Some(7)).limit(), 7);
    }

    #[test]
    fn promises_add_up_and_come_back() {
        let budget = MappingBudget::with_limit(10);
        let mut a = budget.promise(6).unwrap();
        assert_eq!(budget.promise(5).unwrap_err(), BudgetError { asked: 5, used: 6, limit: 10 });
        let b = budget.promise(4).unwrap();
        assert_eq!(a.resize(7).unwrap_err(), BudgetError { asked: 1, used: 10, limit: 10 });
        assert_eq!(a.count(), 6, "a refused promise is unchanged");
        let other = budget.beside();
        assert!(other.promise(1).is_err(), "the process's, not the store's");
        assert_eq!((other.used(), other.left()), (0, 0));
        a.resize(1).unwrap();
        drop(b);
        assert_eq!((budget.used(), other.left()), (1, 9));
    }
}
