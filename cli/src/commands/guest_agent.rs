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
/// The script that builds the agent, and the path of its result below the target directory.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/agent/build.sh");
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
    find_beside(&own).map_or_else(|| build(&own, Path::new(SCRIPT)), Ok)
}

fn find_beside(own: &Path) -> Option<PathBuf> {
    let dir = own.parent()?;
    let places = [dir.join("clade-agent"), dir.join("../lib/clade/clade-agent")];
    places.into_iter().find(|path| path.is_file())
}

/// Builds the agent by `script`, unless its last result is newer than the program `own`.
fn build(own: &Path, script: &Path) -> Result<PathBuf, Failure> {
    let failed = |why: String| Failure::Input(anyhow!("no agent for the guest: {why}, and {VARIABLE} names none"));
    if !script.is_file() {
        return Err(failed(format!("{} has no clade-agent beside it", own.display())));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.or_else(|| Some(script.ancestors().nth(3)?.join("target")));
    let built = target.map(|target| target.join(BUILT)).filter(|built| is_newer(built, own));
    if let Some(built) = built {
        return Ok(built);
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
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A script in `resources/agent` of `dir`, which prints `path`, makes it, and counts its calls.
    fn script(dir: &Path, path: &Path, code: u8) -> PathBuf {
        let script = dir.join("resources/agent/build.sh");
        fs::create_dir_all(script.parent().unwrap()).unwrap();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let (calls, path) = (dir.join("calls"), path.display());
        write(&script, format!("#!/bin/sh\necho call >> {}\n: >> {path}\necho {path}\nexit {code}\n", calls.display()))
            .unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        script
    }

    #[test]
    fn an_agent_is_built_once_for_each_version_of_the_program() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("bin/clade");
        fs::create_dir_all(own.parent().unwrap()).unwrap();
        write(&own, "").unwrap();
        // The script's own target directory, where the variable is not set.
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| dir.path().join("target"), PathBuf::from);
        let built = target.join(BUILT);
        if built.exists() {
            println!("skipped: CARGO_TARGET_DIR has an agent");
            return;
        }
        let script = script(dir.path(), &built, 0);
        let calls = || fs::read_to_string(dir.path().join("calls")).unwrap_or_default().lines().count();
        for _ in 0..2 {
            assert_eq!(build(&own, &script).unwrap(), built);
            assert_eq!(calls(), 1);
        }
        let later = fs::metadata(&built).unwrap().modified().unwrap() + std::time::Duration::from_secs(1);
        File::options().append(true).open(&own).unwrap().set_modified(later).unwrap();
        assert_eq!(build(&own, &script).unwrap(), built);
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
        let missing = build(&own, &dir.path().join("resources/agent/build.sh")).unwrap_err().to_string();
        assert!(missing.contains("no clade-agent beside it") && missing.contains(VARIABLE), "{missing}");
        let script = script(dir.path(), &dir.path().join("result"), 3);
        let failed = build(&own, &script).unwrap_err().to_string();
        assert!(failed.contains("build.sh has failed") && failed.contains('3'), "{failed}");
    }
}
