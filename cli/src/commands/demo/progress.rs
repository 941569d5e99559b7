//! Progress on a terminal; nothing in a program's output.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::DemoArgs;

/// Makes a bar of `steps`. Hidden if standard error is not a terminal or the output is JSON.
pub(crate) fn bar(args: &DemoArgs, what: &'static str, steps: usize) -> ProgressBar {
    if args.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:34} {wide_bar:.cyan/blue} {pos:>4}/{len}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style).with_message(what)
}

/// A spinner for work of unknown duration.
pub(crate) fn spinner(args: &DemoArgs, what: &'static str) -> ProgressBar {
    if args.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:34} {spinner} {elapsed}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_spinner());
    let spinner = ProgressBar::new_spinner().with_style(style).with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
