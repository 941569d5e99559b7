//! Names of VMs that are made together, and the end of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Children;
use super::dir::{NameClaim, RuntimeDir};
use super::error::{CancelReason, FleetError, MAX_CHILDREN};

/// Cancels a request. A clone cancels the same request.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicU8>);

const CLIENT_GONE: u8 = 1;
const ENDING: u8 = 2;

impl Cancel {
    /// Cancels because the client has gone.
    pub(crate) fn client_gone(&self) {
        self.set(CLIENT_GONE);
    }

    /// Cancels because the process ends.
    pub fn ending(&self) {
        self.set(ENDING);
    }

    fn set(&self, reason: u8) {
        // Relaxed: read between two children, and nothing is published through it.
        self.0.store(reason, Ordering::Relaxed);
    }

    pub(crate) fn reason(&self) -> Option<CancelReason> {
        match self.0.load(Ordering::Relaxed) {
            CLIENT_GONE => Some(CancelReason::ClientGone),
            ENDING => Some(CancelReason::Ending),
            _ => None,
        }
    }
}

/// Refuses a number of children that cannot be, or that `pattern` has no names for.
pub(crate) fn check_names(count: usize, pattern: Option<&str>) -> Result<(), FleetError> {
    if !(1..=MAX_CHILDREN).contains(&count) {
        return Err(FleetError::Count { count });
    }
    match pattern {
        Some(pattern) if count > 1 && !pattern.contains("{n}") => {
            Err(FleetError::Pattern { pattern: pattern.to_owned() })
        }
        _ => Ok(()),
    }
}

/// Claims the names of `wanted` children of `stem`. `{n}` in their pattern counts up from 1; a name
/// that `is_listed`, or taken, is skipped. A pattern without `{n}` is the name.
pub(crate) fn claim_names(
    dir: &RuntimeDir,
    stem: &str,
    wanted: &Children<'_>,
    is_listed: impl Fn(&str) -> bool,
    check: impl Fn() -> Result<(), FleetError>,
) -> Result<Vec<NameClaim>, FleetError> {
    let Children { count, pattern, .. } = *wanted;
    check_names(count, pattern)?;
    let default = format!("{stem}-{{n}}");
    let pattern = pattern.unwrap_or(&default);
    if !pattern.contains("{n}") {
        check()?;
        return Ok(vec![NameClaim::new(dir, pattern)?]);
    }
    let mut all = Vec::with_capacity(count);
    for name in (1u64..).map(|n| pattern.replace("{n}", &n.to_string())).filter(|name| !is_listed(name)) {
        match NameClaim::new(dir, &name) {
            // The name of another request's VM, or of another process's.
            Err(FleetError::Taken { .. }) => continue,
            claim => all.push(claim?),
        }
        check()?;
        if all.len() == count {
            break;
        }
    }
    Ok(all)
}
