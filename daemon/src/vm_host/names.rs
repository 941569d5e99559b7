//! Names of VMs that are made together, and the end of a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::dir::{NameClaim, RuntimeDir, check_name};
use super::error::{CancelReason, DaemonError, MAX_CHILDREN};

/// Cancels a request. A clone cancels the same request.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Cancels because the client has gone.
    pub(crate) fn client_gone(&self) {
        // Relaxed: read between two children, and nothing is published through it.
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn reason(&self) -> Option<CancelReason> {
        self.0.load(Ordering::Relaxed).then_some(CancelReason::ClientGone)
    }
}

/// Refuses an impossible number of children, or one that `pattern` has too few names for.
pub(crate) fn check_names(count: usize, pattern: Option<&str>) -> Result<(), DaemonError> {
    if !(1..=MAX_CHILDREN).contains(&count) {
        return Err(DaemonError::Count { count });
    }
    // With the shortest number: a longer one cannot make an invalid name valid.
    pattern.map_or(Ok(()), |pattern| check_name(&pattern.replace("{n}", "1")))?;
    match pattern {
        Some(pattern) if count > 1 && !pattern.contains("{n}") => {
            Err(DaemonError::Pattern { pattern: pattern.to_owned() })
        }
        _ => Ok(()),
    }
}

/// Claims `count` names from `pattern` ([`check_names`]) for children of `stem`. `{n}` in it counts
/// up from 1; a name that `is_listed`, or taken, is skipped. A pattern without `{n}` is the name.
/// Default: the parent's name and a number.
pub(crate) fn claim_names(
    dir: &RuntimeDir,
    stem: &str,
    count: usize,
    pattern: Option<&str>,
    is_listed: impl Fn(&str) -> bool,
    check: impl Fn() -> Result<(), DaemonError>,
) -> Result<Vec<NameClaim>, DaemonError> {
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
            Err(DaemonError::Taken { .. }) => continue,
            claim => all.push(claim?),
        }
        check()?;
        if all.len() == count {
            break;
        }
    }
    Ok(all)
}
