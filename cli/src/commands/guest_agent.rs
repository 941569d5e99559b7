//! The agent's program for guests: found, or built from the sources that this program was built from.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use anyhow::anyhow;

use crate::commands::Failure;
use crate::commands::run::say;

/// The variable that names the agent's program.
const VARIABLE: &str = "CLADE_AGENT";
/// The script that builds the agent, its target directory without CARGO_TARGET_DIR, and the path of its
/// result below that.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/agent/build.sh");
const TARGET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
const BUILT: &str = "agent/x86_64-unknown-linux-gnu/agent/clade-agent";

/// Returns the agent's program: that of the variable, or `clade-agent` beside this program or in
/// `../lib/clade`. Otherwise builds it, where the sources and cargo are there: half a minute, once for
/// each version of this program.
pub(super) fn find_or_build() -> Result<PathBuf, Failure> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from) {
        return match path.is_file() {
            true => Ok(path),
            false => Err(Failure::Input(anyhow!("{VARIABLE} names {}, which is not a file", path.display()))),
        };
    }
    let own = std::env::current_exe().map_err(Failure::run)?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| TARGET.into(), PathBuf::from);
    find_beside(&own).map_or_else(|| build(&own, Path::new(SCRIPT), &target.join(BUILT)), Ok)
}

fn find_beside(own: &Path) -> Option<PathBuf> {
    let dir = own.parent()?;
    let places = [dir.join("clade-agent"), dir.join("../lib/clade/clade-agent")];
    places.into_iter().find(|path| path.is_file())
}

/// Builds the agent by `script`, unless its last result `built` is newer than the program `own`.
fn build(own: &Path, script: &Path, built: &Path) -> Result<PathBuf, Failure> {
    let failed = |why: String| Failure::Input(anyhow!("no agent for the guest: {why}, and {VARIABLE} names none"));
    if !script.is_file() {
        return Err(failed(format!("{} has no clade-agent beside it", own.display())));
    }
    if is_newer(built, own) {
        return Ok(built.to_owned());
    }
    say!("clade: building the agent of guests, once");
    let output = Command::new(script).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| failed(format!("{}: {error}", script.display())))?;
    let path = String::from_utf8_lossy(&output.stdout).lines().last().map(PathBuf::from);
    let path = path.filter(|path| output.status.success() && path.is_file());
    let path = path.ok_or_else(|| failed(format!("{} has failed ({})", script.display(), output.status)))?;
    // cargo leaves the time of a program that is up to date.
    if let Err(error) = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now())) {
        tracing::debug!(%error, path = %path.display(), "the agent will be looked at again");
    }
    Ok(path)
}

fn is_newer(built: &Path, own: &Path) -> bool {
    let modified = |path: &Path| -> io::Result<SystemTime> { fs::metadata(path)?.modified() };
    matches!((modified(built), modified(own)), (Ok(built), Ok(own)) if built > own)
}

#[cfg(test)]
mod tests {
    use std::fs::write;

    use clade_test_support::write_program;

    use super::*;

    /// A script in `dir`, which prints `path`, makes it, and counts its calls.
    fn script(dir: &Path, path: &Path, code: u8) -> PathBuf {
        let script = dir.join("build.sh");
        let (calls, path) = (dir.join("calls"), path.display());
        let text = format!("#!/bin/sh\necho call >> {}\n: >> {path}\necho {path}\nexit {code}\n", calls.display());
        write_program(&script, &text, 0o755);
        script
    }

    #[test]
    fn an_agent_is_built_once_for_each_version_of_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("bin/clade");
        fs::create_dir_all(own.parent().unwrap()).unwrap();
        write(&own, "").unwrap();
        let built = dir.path().join("built");
        let script = script(dir.path(), &built, 0);
        let calls = || fs::read_to_string(dir.path().join("calls")).unwrap_or_default().lines().count();
        for _ in 0..2 {
            assert_eq!(build(&own, &script, &built).unwrap(), built);
            assert_eq!(calls(), 1);
        }
        let later = fs::metadata(&built).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
        File::options().append(true).open(&own).unwrap().set_modified(later).unwrap();
        assert_eq!(build(&own, &script, &built).unwrap(), built);
        assert_eq!(calls(), 2, "another version of the program");
        // One beside the program comes first.
        assert_eq!(find_beside(&own), None);
        write(dir.path().join("bin/clade-agent"), "").unwrap();
        assert_eq!(find_beside(&own), Some(dir.path().join("bin/clade-agent")));
    }

    #[test]
    fn a_missing_script_and_one_that_fails_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("clade");
        write(&own, "").unwrap();
        let built = dir.path().join("built");
        let missing = build(&own, &dir.path().join("build.sh"), &built).unwrap_err().to_string();
        assert!(missing.contains("no clade-agent beside it") && missing.contains(VARIABLE), "{missing}");
        let script = script(dir.path(), &built, 3);
        let failed = build(&own, &script, &built).unwrap_err().to_string();
        assert!(failed.contains("build.sh has failed") && failed.contains('3'), "{failed}");
    }
}
