//! Names of VMs that are made together.

use super::{NameClaim, RuntimeDir, check_name};
use crate::error::{DaemonError, MAX_CHILDREN};

/// Refuses an impossible number of children, or one that `pattern` has too few names for.
pub fn check_names(count: usize, pattern: Option<&str>) -> Result<(), DaemonError> {
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
pub fn claim_names(
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
