//! The log on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

use crate::commands::Failure;

/// The variable that selects what is logged.
const VARIABLE: &str = "CLADE_LOG";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Whether `directive` is a level, or `MODULE=LEVEL` for a module of Clade.
fn is_directive(directive: &str) -> bool {
    let is_level = |text: &str| LEVELS.contains(&text.to_ascii_lowercase().as_str());
    match directive.split_once('=') {
        None => is_level(directive),
        Some((module, level)) => {
            let is_path = module.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b));
            module.starts_with("clade") && is_path && is_level(level)
        }
    }
}

fn filter(text: &str) -> Result<EnvFilter, Failure> {
    let directives = if text.is_empty() { "warn" } else { text };
    if let Some(wrong) = directives.split(',').find(|directive| !is_directive(directive)) {
        let error = anyhow::anyhow!(
            "{VARIABLE} has {wrong:?}: it takes {}, or MODULE=LEVEL as in clade_memory=debug, with commas between",
            LEVELS.join(", ")
        );
        return Err(Failure::Input(error));
    }
    Ok(EnvFilter::new(directives))
}

/// Starts to log what `CLADE_LOG` selects, by default warnings.
///
/// On a terminal the log has colours. In a file or a pipe it has the time of day in UTC.
///
/// # Errors
/// When the variable has a directive that is not valid.
pub(super) fn init() -> Result<(), Failure> {
    let text = std::env::var_os(VARIABLE).unwrap_or_default();
    let log = tracing_subscriber::fmt().with_env_filter(filter(&text.to_string_lossy())?).with_writer(io::stderr);
    // The subscriber would report them on standard error, and panic if that is closed.
    let log = log.log_internal_errors(false);
    if io::stderr().is_terminal() {
        log.without_time().init();
    } else {
        log.with_ansi(false).with_timer(SystemTime).init();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_by_name() {
        for good in ["", "debug", "WARN", "off", "clade=debug,clade_memory::freeze=trace,error"] {
            assert!(filter(good).is_ok(), "{good:?}");
        }
        for bad in ["nonsense", "debug,", "clade=loud", "hyper=debug", "clade[x]=debug", "3", "warn debug"] {
            let error = filter(bad).unwrap_err().to_string();
            assert!(error.contains(VARIABLE) && !error.contains('\n'), "{bad:?}: {error}");
        }
    }
}
