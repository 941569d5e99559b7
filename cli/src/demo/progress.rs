//! Showing that something is going on, to a person and never to a program.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::DemoArgs;

/// A bar of `steps`; hidden when standard error is no terminal, or the output is for a program.
pub(crate) fn bar(args: &DemoArgs, what: &'static str, steps: usize) -> ProgressBar {
    if args.json {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:34} {wide_bar:.cyan/blue} {pos:>4}/{len}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style).with_message(what)
}

/// A spinner for something that takes as long as it takes.
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
