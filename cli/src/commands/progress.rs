//! Words on standard error about work that takes longer than a second.

use std::future::Future;
use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::run::say;

/// When it is first shown that work goes on.
const SHOW_AFTER: Duration = Duration::from_secs(1);
/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(100);
/// How often a line is printed where there is no terminal.
const REPEAT: Duration = Duration::from_secs(10);

/// Does `work`, and shows `message` if that takes longer than a second: a spinner on a terminal,
/// otherwise a line every ten seconds.
pub(crate) async fn shown<T>(work: impl Future<Output = T>, message: impl Fn() -> String) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(SHOW_AFTER) => {}
    }
    if !io::stderr().is_terminal() {
        loop {
            say!("clade: {}", message());
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(REPEAT) => {}
            }
        }
    }
    let template = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
    let spinner = ProgressBar::new_spinner().with_style(template.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    let spinner = spinner.with_elapsed(SHOW_AFTER);
    let done = loop {
        spinner.set_message(message());
        spinner.tick();
        tokio::select! {
            done = &mut work => break done,
            () = tokio::time::sleep(TICK) => {}
        }
    };
    spinner.finish_and_clear();
    done
}
