//! The log on standard error.

use std::fmt::{self, Write};
use std::io::{self, IsTerminal};

use clade_api::flight;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::time::SystemTime;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

use crate::commands::Failure;

/// The variable with the filter of the log.
const VARIABLE: &str = "CLADE_LOG";
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Returns whether `directive` is a level, or `MODULE=LEVEL` for a module of Clade.
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
    let filter = filter(&text.to_string_lossy())?;
    let log = tracing_subscriber::fmt::layer::<Registry>().with_writer(io::stderr);
    // The subscriber would report them on standard error, and panic if that is closed.
    let log = log.log_internal_errors(false);
    let log = if io::stderr().is_terminal() {
        log.without_time().with_filter(filter).boxed()
    } else {
        log.with_ansi(false).with_timer(SystemTime).with_filter(filter).boxed()
    };
    let noted = filter_fn(|event| *event.level() <= Level::WARN || event.target() == clade_vmm::FLIGHT);
    tracing_subscriber::registry().with(log).with(FlightLog.with_filter(noted)).init();
    Ok(())
}

/// Notes warnings and errors in the flight record of the process's VM, if it has one.
struct FlightLog;

impl<S: Subscriber> Layer<S> for FlightLog {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        flight::note(&format!("{}{}", line.message, line.fields));
    }
}

/// An event as text: its message and its fields.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
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
