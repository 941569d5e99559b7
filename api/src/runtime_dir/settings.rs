//! Settings of a supervisor, kept in the runtime directory until its orderly end: the next
//! supervisor of the directory has them if this one is killed.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::RuntimeDir;
use crate::DaemonError;

const FILE: &str = "clade.serve";

/// The arguments of a supervisor, and its working directory: paths in them are relative to that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSettings {
    /// The arguments, without the program's name.
    pub args: Vec<String>,
    /// The working directory.
    pub working_dir: PathBuf,
}

fn failed(dir: &RuntimeDir, source: std::io::Error) -> DaemonError {
    DaemonError::Runtime { path: dir.path().join(FILE), source }
}

impl KeptSettings {
    /// Keeps the settings in the runtime directory `dir`, instead of earlier ones.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn keep(&self, dir: &Path) -> Result<(), DaemonError> {
        let dir = RuntimeDir::create(dir)?;
        let bytes = serde_json::to_vec(self).map_err(|error| failed(&dir, error.into()))?;
        dir.write(FILE, &bytes).map_err(|error| failed(&dir, error))
    }

    /// Returns the settings of a supervisor of `dir` that has ended without [`Self::forget`].
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn kept(dir: &Path) -> Result<Option<Self>, DaemonError> {
        let dir = RuntimeDir::create(dir)?;
        let bytes = dir.read(FILE).map_err(|error| failed(&dir, error))?;
        bytes.map(|bytes| serde_json::from_slice(&bytes).map_err(|error| failed(&dir, error.into()))).transpose()
    }

    /// Removes the settings of `dir`.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn forget(dir: &Path) -> Result<(), DaemonError> {
        let dir = RuntimeDir::create(dir)?;
        dir.remove(FILE).map_err(|error| failed(&dir, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_kept_until_they_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(KeptSettings::kept(dir).unwrap(), None);
        let settings = |arg: &str| KeptSettings { args: vec!["serve".into(), arg.into()], working_dir: "/srv".into() };
        for arg in ["--e2b=127.0.0.1:1", "--pool=3"] {
            settings(arg).keep(dir).unwrap();
            assert_eq!(KeptSettings::kept(dir).unwrap(), Some(settings(arg)));
        }
        std::fs::write(dir.join(FILE), b"{}").unwrap();
        assert!(KeptSettings::kept(dir).unwrap_err().to_string().contains(FILE));
        KeptSettings::forget(dir).unwrap();
        KeptSettings::forget(dir).unwrap();
        assert_eq!(KeptSettings::kept(dir).unwrap(), None);
    }
}
