//! `clade completions` and `clade man`: generated from the description of the command line. `clade
//! openapi`: the description of the API.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::{Shell, generate};
use clap_mangen::Man;

use crate::commands::args::Cli;
use crate::commands::{Failure, Outcome, print_json};

#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ManArgs {
    /// The directory for the pages. A missing one is made.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs) -> Outcome {
    let mut text = Vec::new();
    generate(args.shell, &mut Cli::command(), "clade", &mut text);
    io::stdout().write_all(&text).map_err(Failure::run)
}

/// Writes a page for `command` and for each of its visible subcommands, in `dir`.
fn pages(command: &clap::Command, dir: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page)?;
    fs::write(dir.join(format!("{name}.1")), page)?;
    let shown = command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help");
    shown.into_iter().try_for_each(|below| pages(below, dir))
}

pub(super) fn man(args: &ManArgs) -> Outcome {
    let mut command = Cli::command();
    // Sets the name of each page.
    command.build();
    let written = fs::create_dir_all(&args.dir).and_then(|()| pages(&command, &args.dir));
    written.map_err(|error| Failure::Input(anyhow::anyhow!("{}: {error}", args.dir.display())))
}

pub(super) fn openapi() -> Outcome {
    print_json(&clade_supervisor::described()).map_err(Failure::run)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Collects the words of each visible subcommand.
    fn shown(command: &clap::Command, words: &[String], all: &mut Vec<Vec<String>>) {
        for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
            let words = [words, &[below.get_name().to_owned()]].concat();
            all.push(words.clone());
            shown(below, &words, all);
        }
    }

    #[test]
    fn every_subcommand_has_a_page_and_is_completed_in_each_shell() {
        let mut command = Cli::command();
        command.build();
        let mut all = Vec::new();
        shown(&command, &[], &mut all);
        assert!(all.len() > 25, "{all:?}");
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("man1");
        man(&ManArgs { dir: into.clone() }).unwrap();
        for words in &all {
            let page = fs::read_to_string(into.join(format!("clade-{}.1", words.join("-")))).unwrap();
            assert!(page.contains(".SH SYNOPSIS") && page.contains(".SH DESCRIPTION"), "{words:?}");
        }
        assert_eq!(fs::read_dir(&into).unwrap().count(), all.len() + 1, "and one for all");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            generate(shell, &mut Cli::command(), "clade", &mut text);
            let text = String::from_utf8(text).unwrap();
            for words in &all {
                assert!(text.contains(words.last().unwrap()), "{shell}: {words:?}");
            }
        }
    }
}
