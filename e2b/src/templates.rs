//! Templates on the disk: a snapshot for each, and its record.
//!
//! | path | content |
//! |---|---|
//! | `NAME.json` | the record of the template of that name: its id, and its build |
//! | `ID/` | its snapshot |
//! | `lock` | locked by a writer |
//!
//! A template exists with its record, which is written last and replaces an older one atomically. A
//! directory without a record is from a killed build, and the next writer removes it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use clade_api::{check_name, random_hex, write_durably};
use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The variable with the directory of templates, if not with the user's data.
pub const TEMPLATES_VARIABLE: &str = "CLADE_TEMPLATE_DIR";
const LOCK: &str = "lock";
const ENDING: &str = ".json";

/// An error of the store.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// There is no directory for it.
    #[error("no directory for templates: set {TEMPLATES_VARIABLE}, XDG_DATA_HOME or HOME")]
    NoDirectory,
    /// A file cannot be used.
    #[error("{} cannot be {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The failed operation.
        what: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// No template has the name or id.
    #[error("there is no template {0:?}")]
    NotFound(String),
    /// The name is invalid.
    #[error("invalid template name {0:?}: 1 to 48 letters, digits, '-', '_' and '.', a letter or digit first")]
    Name(String),
}

fn failed(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> TemplateError {
    let path = path.to_owned();
    move |source| TemplateError::File { path, what, source }
}

/// The sources of a template, and its sandboxes' settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TemplateSpec {
    /// The image, or the directory of the Dockerfile.
    pub source: String,
    /// The digest of the booted image.
    pub image: String,
    /// The program started, if any.
    pub start: Vec<String>,
    /// The command that had to succeed before the snapshot.
    pub ready: Option<String>,
    /// Variables of all programs.
    pub env: BTreeMap<String, String>,
    /// The default user of programs.
    pub user: String,
    /// Their working directory.
    pub workdir: String,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub mib: u64,
}

/// A template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its name. A later build of that name replaces it.
    pub name: String,
    /// The id of its build, which is also the name of its checkpoint in the supervisor and of its
    /// snapshot's directory.
    pub id: String,
    /// Time of its publication.
    pub created_at: Timestamp,
    /// Its description.
    #[serde(flatten)]
    pub spec: TemplateSpec,
}

/// Returns the directory in the environment `variable`, else `name` in the user's data directory. None if
/// neither is known.
#[must_use]
pub fn user_data_dir(variable: &str, name: &str) -> Option<PathBuf> {
    let of = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let data = || of("XDG_DATA_HOME").or_else(|| of("HOME").map(|home| home.join(".local/share")));
    of(variable).or_else(|| data().map(|dir| dir.join(name)))
}

/// The templates of a directory.
#[derive(Clone, Debug)]
pub struct TemplateStore(PathBuf);

/// A build that holds the store's lock. Without [`Draft::publish`] it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    store: TemplateStore,
    _lock: File,
    name: String,
    id: String,
    is_published: bool,
}

impl TemplateStore {
    /// Returns the templates of this user: in [`TEMPLATES_VARIABLE`], else in `clade/templates` of
    /// `XDG_DATA_HOME`.
    ///
    /// # Errors
    /// When neither is set.
    pub fn of_user() -> Result<Self, TemplateError> {
        let dir = user_data_dir(TEMPLATES_VARIABLE, "clade/templates").ok_or(TemplateError::NoDirectory)?;
        Ok(Self::at(&std::path::absolute(&dir).map_err(failed(&dir, "found"))?))
    }

    /// Returns the templates of a directory, which may be missing.
    #[must_use]
    pub fn at(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Returns a new id.
    ///
    /// # Errors
    /// When the host has no random numbers.
    pub fn new_id(&self) -> Result<String, TemplateError> {
        Ok(format!("t{}", random_hex::<9>().map_err(failed(&self.0, "named in"))?))
    }

    /// Returns the directory of a template's snapshot.
    #[must_use]
    pub fn snapshot(&self, id: &str) -> PathBuf {
        self.0.join(id)
    }

    fn record(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}{ENDING}"))
    }

    fn read(path: &Path) -> Result<Option<Template>, TemplateError> {
        match fs::read(path) {
            Ok(bytes) => {
                let read = serde_json::from_slice(&bytes).map_err(io::Error::from);
                read.map(Some).map_err(failed(path, "read as a template"))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(path, "read")(error)),
        }
    }

    /// Returns all templates, by name. Unreadable records are skipped.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Template>, TemplateError> {
        self.read_all().map(|(all, _)| all)
    }

    /// The same, with whether the list is complete.
    fn read_all(&self) -> Result<(Vec<Template>, bool), TemplateError> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), true)),
            entries => entries.map_err(failed(&self.0, "read"))?,
        };
        let (mut all, mut is_whole) = (Vec::new(), true);
        for entry in entries {
            let path = entry.map_err(failed(&self.0, "read"))?.path();
            let file = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            // A file being written begins with a dot.
            let Some(name) = file.strip_suffix(ENDING).filter(|name| check_name(name).is_ok()) else { continue };
            match Self::read(&path) {
                Ok(template) => all.extend(template.filter(|template| template.name == name)),
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "is left out");
                    is_whole = false;
                }
            }
        }
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok((all, is_whole))
    }

    /// Returns the template of a name or an id.
    ///
    /// # Errors
    /// When no template has it, or it cannot be read.
    pub fn find(&self, name: &str) -> Result<Template, TemplateError> {
        check_name(name).map_err(|_| TemplateError::NotFound(name.to_owned()))?;
        if let Some(template) = Self::read(&self.record(name))? {
            return Ok(template);
        }
        let found = self.list()?.into_iter().find(|template| template.id == name);
        found.ok_or_else(|| TemplateError::NotFound(name.to_owned()))
    }

    /// Locks the store for a writer, and removes the directories of killed builds.
    fn lock(&self) -> Result<File, TemplateError> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0);
        made.map_err(failed(&self.0, "made"))?;
        let path = self.0.join(LOCK);
        let lock =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(failed(&path, "opened"))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|errno| failed(&path, "locked")(errno.into()))?;
        let (all, is_whole) = self.read_all()?;
        if !is_whole {
            // An unreadable record may be a newer version's, whose snapshot is here.
            return Ok(lock);
        }
        let ids: Vec<String> = all.into_iter().map(|template| template.id).collect();
        for entry in fs::read_dir(&self.0).map_err(failed(&self.0, "read"))?.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            // A snapshot being written has a dot before its name, as the overlays of disks have.
            if is_id(name) && !ids.iter().any(|id| id == name) {
                remove_dir(&entry.path());
            }
        }
        Ok(lock)
    }

    /// Begins to write a template: its snapshot goes to [`Draft::dir`]. Other writers wait until it
    /// is done.
    ///
    /// # Errors
    /// When the name is invalid, or the store cannot be written.
    pub fn draft(&self, name: &str, id: &str) -> Result<Draft, TemplateError> {
        check_template_name(name)?;
        let (store, name, id) = (self.clone(), name.to_owned(), id.to_owned());
        Ok(Draft { _lock: self.lock()?, store, name, id, is_published: false })
    }

    /// Removes a template and its snapshot. VMs of it run on.
    ///
    /// # Errors
    /// When it is missing, or cannot be removed.
    pub fn remove(&self, name: &str) -> Result<Template, TemplateError> {
        // Before the lock makes a directory for it.
        self.find(name)?;
        let _lock = self.lock()?;
        let template = self.find(name)?;
        let path = self.record(&template.name);
        fs::remove_file(&path).map_err(failed(&path, "removed"))?;
        remove_dir(&self.snapshot(&template.id));
        Ok(template)
    }
}

/// Refuses invalid names of templates.
///
/// # Errors
/// [`TemplateError::Name`].
pub fn check_template_name(name: &str) -> Result<(), TemplateError> {
    // A name that looks like an id would be ambiguous.
    let refused = check_name(name).is_err() || is_id(name);
    if refused { Err(TemplateError::Name(name.to_owned())) } else { Ok(()) }
}

fn is_id(name: &str) -> bool {
    name.strip_prefix('t').is_some_and(|hex| hex.len() == 18 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The next writer removes a directory that remains.
fn remove_dir(path: &Path) {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "is not removed");
        }
        _ => {}
    }
}

impl Draft {
    /// Returns the directory for its snapshot.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.store.snapshot(&self.id)
    }

    /// Publishes it under its name. Returns it, and the older template that it replaces.
    ///
    /// # Errors
    /// When the record cannot be written. Then the older one stays.
    pub fn publish(mut self, spec: TemplateSpec) -> Result<(Template, Option<Template>), TemplateError> {
        let path = self.store.record(&self.name);
        // An unreadable record is replaced all the same.
        let old = TemplateStore::read(&path).ok().flatten();
        let template = Template { name: self.name.clone(), id: self.id.clone(), created_at: Timestamp::now(), spec };
        let content = serde_json::to_vec_pretty(&template).map_err(io::Error::from);
        content.and_then(|content| write_durably(&path, &content)).map_err(failed(&path, "written"))?;
        self.is_published = true;
        if let Some(old) = &old {
            remove_dir(&self.store.snapshot(&old.id));
        }
        Ok((template, old))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_published {
            remove_dir(&self.dir());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(source: &str) -> TemplateSpec {
        TemplateSpec { source: source.to_owned(), ..TemplateSpec::default() }
    }

    fn build(store: &TemplateStore, name: &str, source: &str) -> (Template, Option<Template>) {
        let draft = store.draft(name, &store.new_id().unwrap()).unwrap();
        fs::create_dir(draft.dir()).unwrap();
        fs::write(draft.dir().join("memory"), source).unwrap();
        draft.publish(spec(source)).unwrap()
    }

    #[test]
    fn a_template_is_found_by_name_and_id_and_replaced_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = TemplateStore::at(&dir.path().join("deep/templates"));
        assert!(store.list().unwrap().is_empty() && matches!(store.find("a"), Err(TemplateError::NotFound(_))));
        assert!(matches!(store.remove("a"), Err(TemplateError::NotFound(_))) && !dir.path().join("deep").exists());
        let (first, none) = build(&store, "a", "one");
        let (other, _) = build(&store, "b", "two");
        assert_eq!(
            (none, store.find("a").unwrap(), store.find(&first.id).unwrap()),
            (None, first.clone(), first.clone())
        );
        let (second, old) = build(&store, "a", "three");
        assert_eq!((old, store.find("a").unwrap()), (Some(first.clone()), second.clone()));
        assert!(matches!(store.find(&first.id), Err(TemplateError::NotFound(_))));
        assert!(!store.snapshot(&first.id).exists() && store.snapshot(&second.id).join("memory").exists());
        assert_eq!(store.list().unwrap(), [second.clone(), other.clone()]);
        assert_eq!(store.remove(&other.id).unwrap(), other);
        assert!(!store.snapshot(&other.id).exists() && store.list().unwrap() == [second]);
    }

    #[test]
    fn a_build_that_fails_leaves_the_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = TemplateStore::at(dir.path());
        let (first, _) = build(&store, "a", "one");
        let draft = store.draft("a", &store.new_id().unwrap()).unwrap();
        fs::create_dir(draft.dir()).unwrap();
        let half = draft.dir();
        drop(draft);
        assert!(!half.exists() && store.find("a").unwrap() == first && store.snapshot(&first.id).exists());
        // A killed build has left its directory. Unrelated directories stay.
        let killed = store.snapshot(&store.new_id().unwrap());
        fs::create_dir(&killed).unwrap();
        fs::create_dir(dir.path().join("other")).unwrap();
        build(&store, "b", "two");
        assert!(!killed.exists() && dir.path().join("other").exists() && store.snapshot(&first.id).exists());
    }

    #[test]
    fn names_are_none_of_ids_and_no_ways_out() {
        let store = TemplateStore::at(Path::new("/nowhere"));
        let id = store.new_id().unwrap();
        for wrong in ["", "..", "a/b", ".a", "a b", id.as_str()] {
            assert!(matches!(store.draft(wrong, &id), Err(TemplateError::Name(_))), "{wrong}");
        }
        assert!(matches!(store.find("../a"), Err(TemplateError::NotFound(_))));
    }

    #[test]
    fn what_is_no_record_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let store = TemplateStore::at(dir.path());
        let (first, _) = build(&store, "a", "one");
        fs::write(dir.path().join("bad.json"), "{").unwrap();
        // A record under another name is invalid.
        fs::copy(dir.path().join("a.json"), dir.path().join("copy.json")).unwrap();
        assert_eq!(store.list().unwrap(), std::slice::from_ref(&first));
        let error = store.find("bad").unwrap_err();
        assert!(error.to_string().contains("bad.json"), "{error}");
        // The owner of these snapshots is unknown: all stay.
        let perhaps = store.snapshot(&store.new_id().unwrap());
        fs::create_dir(&perhaps).unwrap();
        build(&store, "c", "three");
        assert!(perhaps.exists());
        // A build of that name repairs it.
        build(&store, "bad", "two");
        assert_eq!(store.find("bad").unwrap().spec.source, "two");
    }
}
