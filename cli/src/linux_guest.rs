//! The Linux test guest: finds or builds its kernel and initramfs.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;
use thiserror::Error;

/// The variable that names a directory to use instead of building a guest.
pub(crate) const GUEST_ENV: &str = "CLADE_LINUX_GUEST";

/// The guest's sources. The script hashes these, so that each version of them has its own
/// directory.
const SOURCES: [(&str, &[u8]); 6] = [
    ("build.sh", include_bytes!("../../resources/linux/build.sh")),
    ("guest.config", include_bytes!("../../resources/linux/guest.config")),
    ("kernel.patch", include_bytes!("../../resources/linux/kernel.patch")),
    ("init.c", include_bytes!("../../resources/linux/init.c")),
    ("vsock.c", include_bytes!("../../resources/linux/vsock.c")),
    ("console", include_bytes!("../../resources/linux/console")),
];

/// Reason why there is no Linux guest.
#[derive(Debug, Error)]
pub(crate) enum LinuxGuestError {
    /// The directory that the variable names has no guest.
    #[error("{GUEST_ENV} is {}, which has no {file}", dir.display())]
    Incomplete {
        /// The directory named.
        dir: PathBuf,
        /// The missing file.
        file: &'static str,
    },
    /// The script could not be run.
    #[error("the guest's build script cannot be run")]
    Script(#[source] io::Error),
    /// The script failed; its output has the reason.
    #[error("the guest could not be built ({status})")]
    Build {
        /// The script's exit status.
        status: std::process::ExitStatus,
    },
}

/// The files of a Linux guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LinuxGuest {
    /// An ELF vmlinux.
    pub kernel: PathBuf,
    /// A busybox userland.
    pub initrd: PathBuf,
}

impl LinuxGuest {
    fn of(dir: &Path) -> Result<Self, LinuxGuestError> {
        let file = |file: &'static str| match dir.join(file) {
            path if path.is_file() => Ok(path),
            _ => Err(LinuxGuestError::Incomplete { dir: dir.to_owned(), file }),
        };
        Ok(Self { kernel: file("vmlinux")?, initrd: file("initramfs.cpio")? })
    }

    /// Finds the guest that `$CLADE_LINUX_GUEST` names, or that was built before. Returns None if
    /// neither exists.
    ///
    /// # Errors
    /// When the variable names a directory without a guest, or the script cannot be run.
    pub(crate) fn find() -> Result<Option<Self>, LinuxGuestError> {
        if let Some(dir) = std::env::var_os(GUEST_ENV).filter(|dir| !dir.is_empty()) {
            return Self::of(Path::new(&dir)).map(Some);
        }
        run_script(&["--path"], Stdio::null())?.map(|dir| Self::of(&dir)).transpose()
    }

    /// Finds the guest, or builds it once from Debian's packages in some minutes. The build's
    /// output goes to standard error.
    ///
    /// # Errors
    /// As [`LinuxGuest::find`], and when the build fails.
    pub(crate) fn build() -> Result<Self, LinuxGuestError> {
        match Self::find()? {
            Some(guest) => Ok(guest),
            None => Self::of(&run_script(&[], Stdio::inherit())?.unwrap_or_default()),
        }
    }
}

/// Runs the script on its embedded sources. Returns the directory that it prints, or None if `args`
/// only query for a missing guest.
fn run_script(args: &[&str], stderr: Stdio) -> Result<Option<PathBuf>, LinuxGuestError> {
    let sources = tempfile::tempdir().map_err(LinuxGuestError::Script)?;
    for (name, bytes) in SOURCES {
        fs::write(sources.path().join(name), bytes).map_err(LinuxGuestError::Script)?;
    }
    let script = sources.path().join("build.sh");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).map_err(LinuxGuestError::Script)?;
    let output = Command::new("bash").arg(&script).args(args).stdin(Stdio::null()).stderr(stderr).output();
    let output = output.map_err(LinuxGuestError::Script)?;
    match (output.status.success(), args.is_empty()) {
        (true, _) => Ok(String::from_utf8_lossy(&output.stdout).lines().last().map(PathBuf::from)),
        (false, true) => Err(LinuxGuestError::Build { status: output.status }),
        (false, false) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_the_script_reads_is_embedded() {
        let script = String::from_utf8_lossy(SOURCES[0].1);
        let inputs = script.lines().find_map(|line| line.strip_prefix("inputs=(")?.strip_suffix(')')).unwrap();
        assert_eq!(inputs.split(' ').collect::<Vec<_>>(), SOURCES.map(|(name, _)| name));
    }

    #[test]
    fn a_directory_without_a_kernel_is_no_guest() {
        let dir = tempfile::tempdir().unwrap();
        let error = LinuxGuest::of(dir.path()).unwrap_err().to_string();
        assert!(error.contains("vmlinux") && error.contains(dir.path().to_str().unwrap()), "{error}");
        fs::write(dir.path().join("vmlinux"), "").unwrap();
        fs::write(dir.path().join("initramfs.cpio"), "").unwrap();
        assert_eq!(LinuxGuest::of(dir.path()).unwrap().kernel, dir.path().join("vmlinux"));
    }
}
