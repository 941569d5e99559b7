//! API keys. Their file has only hashes, so its readers learn no key.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use clade_api::{hex, random_hex, write_durably};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// The prefix of E2B's keys. Its older SDKs check it.
const PREFIX: &str = "e2b_";
/// Most bytes of a key's name.
const MAX_NAME: usize = 48;

/// Reason why keys cannot be read or changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeysError {
    /// Their file cannot be read or written.
    #[error("the file of keys {} cannot be used", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Others may write it.
    #[error("others may write the file of keys {} (mode {mode:04o}); chmod it to 0600", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file is malformed.
    #[error("{} is not a file of keys", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// The name is invalid.
    #[error("invalid key name {name:?}: 1 to {MAX_NAME} letters, digits, '-', '_' and '.'")]
    Name {
        /// The name given.
        name: String,
    },
    /// The name is taken.
    #[error("there is a key {name:?} already")]
    Taken {
        /// The name given.
        name: String,
    },
    /// No key has the name.
    #[error("there is no key {name:?}")]
    None {
        /// The name given.
        name: String,
    },
}

/// The rights of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// All calls.
    #[default]
    All,
    /// Calls that change nothing.
    Read,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::All => "all",
            Self::Read => "read",
        })
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            "read" => Ok(Self::Read),
            _ => Err(format!("{text:?} is not all or read")),
        }
    }
}

/// A key, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Its name.
    pub name: String,
    /// The owner of its sandboxes; the key's name if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    /// Its rights.
    #[serde(default)]
    pub scope: Scope,
    /// The SHA-256 of the key, as hexadecimal digits.
    sha256: String,
}

impl KeyInfo {
    /// Returns the owner of its sandboxes, who may see them. Several keys may have one owner.
    #[must_use]
    pub fn owner(&self) -> &str {
        self.owner.as_deref().unwrap_or(&self.name)
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct KeysFile {
    keys: Vec<KeyInfo>,
}

#[derive(Debug, Default)]
struct LoadedKeys {
    /// The file's last change, its length and its inode.
    version: Option<(SystemTime, u64, u64)>,
    /// The keys by their hashes.
    keys: BTreeMap<String, KeyInfo>,
}

/// The keys of a file. A changed file is read again, so a key can be revoked at once.
#[derive(Debug)]
pub struct ApiKeys {
    path: PathBuf,
    loaded: Mutex<LoadedKeys>,
}

fn check_name(name: &str) -> Result<(), KeysError> {
    let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_name) {
        return Err(KeysError::Name { name: name.to_owned() });
    }
    Ok(())
}

fn hash(key: &str) -> String {
    hex(&Sha256::digest(key.as_bytes()))
}

impl ApiKeys {
    /// Opens the keys of a file. A missing file has no keys.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), loaded: Mutex::default() }
    }

    fn failed(&self, source: io::Error) -> KeysError {
        KeysError::File { path: self.path.clone(), source }
    }

    fn read(&self) -> Result<KeysFile, KeysError> {
        let mut file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(KeysFile::default()),
            other => other.map_err(|source| self.failed(source))?,
        };
        // The mode and the bytes are of one file: it may be replaced meanwhile.
        let mode = file.metadata().map_err(|source| self.failed(source))?.mode() & 0o7777;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|source| self.failed(source))?;
        if mode & 0o022 != 0 {
            return Err(KeysError::Open { path: self.path.clone(), mode });
        }
        serde_json::from_slice(&bytes).map_err(|source| KeysError::Form { path: self.path.clone(), source })
    }

    fn dir(&self) -> &Path {
        self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }

    /// Changes the file. A concurrent change by another process waits, so that neither is lost.
    fn change<T>(&self, change: impl FnOnce(&mut KeysFile) -> Result<T, KeysError>) -> Result<T, KeysError> {
        let opened = std::fs::create_dir_all(self.dir()).and_then(|()| File::open(self.dir()));
        let dir = opened.map_err(|source| self.failed(source))?;
        dir.lock().map_err(|source| self.failed(source))?;
        let mut file = self.read()?;
        let done = change(&mut file)?;
        self.write(&file)?;
        Ok(done)
    }

    /// Replaces the file as a whole: a reader has the old one or the new one. Durable, so that a
    /// removed key stays removed after a power cut.
    fn write(&self, keys: &KeysFile) -> Result<(), KeysError> {
        let text = serde_json::to_vec_pretty(keys).map_err(|error| self.failed(error.into()))?;
        write_durably(&self.path, &text).map_err(|source| self.failed(source))
    }

    /// Makes a key and returns it, this once. Without an `owner` its name is the owner.
    ///
    /// # Errors
    /// When the key's name is taken, a name is malformed, or the file cannot be written.
    pub fn add(&self, name: &str, owner: Option<&str>, scope: Scope) -> Result<String, KeysError> {
        check_name(name)?;
        owner.map_or(Ok(()), check_name)?;
        self.change(|file| {
            if file.keys.iter().any(|key| key.name == name) {
                return Err(KeysError::Taken { name: name.to_owned() });
            }
            let key = format!("{PREFIX}{}", random_hex::<20>().map_err(|source| self.failed(source))?);
            let (name, owner) = (name.to_owned(), owner.map(str::to_owned));
            file.keys.push(KeyInfo { name, owner, scope, sha256: hash(&key) });
            Ok(key)
        })
    }

    /// Revokes a key.
    ///
    /// # Errors
    /// When no key has the name, or the file cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), KeysError> {
        self.change(|file| {
            let count = file.keys.len();
            file.keys.retain(|key| key.name != name);
            match file.keys.len() == count {
                true => Err(KeysError::None { name: name.to_owned() }),
                false => Ok(()),
            }
        })
    }

    /// Returns all keys.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn list(&self) -> Result<Vec<KeyInfo>, KeysError> {
        Ok(self.read()?.keys)
    }

    /// Returns the key that a client shows. The shown text is hashed first, so the time of the
    /// search reveals nothing of the existing keys.
    pub(crate) fn find(&self, shown: &str) -> Result<Option<KeyInfo>, KeysError> {
        let found = std::fs::metadata(&self.path).ok();
        let version = found.and_then(|found| Some((found.modified().ok()?, found.len(), found.ino())));
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if version.is_none() || loaded.version != version {
            // On an error no key is valid.
            *loaded = LoadedKeys::default();
            let keys = self.read()?.keys.into_iter().map(|key| (key.sha256.clone(), key)).collect();
            *loaded = LoadedKeys { version, keys };
        }
        Ok(loaded.keys.get(&hash(shown)).cloned())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_taken_until_it_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/keys.json");
        let keys = ApiKeys::new(&path);
        assert_eq!(keys.find("e2b_").unwrap(), None);
        let one = keys.add("one", None, Scope::All).unwrap();
        let two = keys.add("two", None, Scope::Read).unwrap();
        assert!(one.starts_with("e2b_") && one.len() == 44 && one != two);
        assert!(!std::fs::read_to_string(&path).unwrap().contains(&one[4..]));
        assert_eq!(keys.find(&one).unwrap().unwrap().name, "one");
        assert_eq!(keys.find(&two).unwrap().unwrap().scope, Scope::Read);
        for wrong in ["", "e2b_", &one[1..], &format!("{one} "), &hash(&one)] {
            assert_eq!(keys.find(wrong).unwrap(), None, "{wrong}");
        }
        assert!(matches!(keys.add("one", None, Scope::All), Err(KeysError::Taken { .. })));
        for name in ["", "a b", "ä", &"x".repeat(49)] {
            assert!(matches!(keys.add(name, None, Scope::All), Err(KeysError::Name { .. })), "{name}");
        }
        // By another process.
        ApiKeys::new(&path).remove("one").unwrap();
        assert_eq!(keys.find(&one).unwrap(), None);
        assert_eq!(keys.list().unwrap().len(), 1);
        assert!(matches!(keys.remove("one"), Err(KeysError::None { .. })));
    }

    #[test]
    fn a_file_that_others_write_or_that_is_none_has_no_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        let keys = ApiKeys::new(&path);
        let one = keys.add("one", None, Scope::All).unwrap();
        assert!(keys.find(&one).unwrap().is_some());
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(keys.find(&one), Err(KeysError::Form { .. })));
        assert!(matches!(keys.find(&one), Err(KeysError::Form { .. })));
        std::fs::write(&path, "{\"keys\": []}").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(keys.list(), Err(KeysError::Open { mode: 0o666, .. })));
    }

    #[test]
    fn keys_that_are_added_and_removed_at_once_are_all_there_or_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        ApiKeys::new(&path).add("kept", None, Scope::All).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let keys = ApiKeys::new(&path);
                scope.spawn(move || {
                    for n in 0..8 {
                        keys.add(&format!("k{thread}-{n}"), None, Scope::All).unwrap();
                        keys.add(&format!("gone{thread}-{n}"), None, Scope::All).unwrap();
                        keys.remove(&format!("gone{thread}-{n}")).unwrap();
                    }
                });
            }
        });
        let names: std::collections::BTreeSet<String> =
            ApiKeys::new(&path).list().unwrap().into_iter().map(|key| key.name).collect();
        let wanted = (0..4).flat_map(|thread| (0..8).map(move |n| format!("k{thread}-{n}")));
        assert_eq!(names, wanted.chain(["kept".to_owned()]).collect());
    }

    #[test]
    fn a_key_has_an_owner_which_is_its_name_if_no_other_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        // As an older clade wrote it.
        std::fs::write(&path, r#"{"keys": [{"name": "old", "scope": "all", "sha256": "00"}]}"#).unwrap();
        let keys = ApiKeys::new(&path);
        keys.add("watch", Some("old"), Scope::Read).unwrap();
        let all: Vec<(String, String)> =
            keys.list().unwrap().into_iter().map(|key| (key.owner().to_owned(), key.name)).collect();
        assert_eq!(all, [("old".into(), "old".into()), ("old".into(), "watch".into())]);
        assert!(matches!(keys.add("x", Some("a/b"), Scope::All), Err(KeysError::Name { name }) if name == "a/b"));
    }
}
