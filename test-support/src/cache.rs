//! Guests that have booted once on this host. A boot takes most of a minute where guest kernels are
//! interpreted, and a restore takes milliseconds.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

/// Written when a cached directory is complete.
const DONE: &str = "done";

/// A hash over everything that a cached guest depends on. The host's kernel and the model of its
/// processors are in every key.
#[derive(Clone, Debug)]
pub struct CacheKey {
    recipe: &'static str,
    hasher: DefaultHasher,
}

impl CacheKey {
    /// A key for the guests of a recipe in this version.
    #[must_use]
    pub fn new(recipe: &'static str, version: u32) -> Self {
        let mut hasher = DefaultHasher::new();
        version.hash(&mut hasher);
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().hash(&mut hasher);
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        cpus.lines().find(|line| line.starts_with("model name")).hash(&mut hasher);
        Self { recipe, hasher }
    }

    /// Adds a text.
    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        text.hash(&mut self.hasher);
        self
    }

    /// Adds a file's content.
    ///
    /// # Panics
    /// When the file cannot be read.
    #[must_use]
    pub fn file(mut self, path: &Path) -> Self {
        let content = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        content.hash(&mut self.hasher);
        self
    }

    /// The directory of this key. `make` fills it if it is missing or incomplete, or if `check` refuses
    /// its content: a snapshot of another version, for example. One process makes it, others wait.
    ///
    /// `None` if `make` returns `None`.
    ///
    /// # Panics
    /// When the cache directory cannot be written.
    #[must_use]
    pub fn get(
        self,
        check: impl FnOnce(&Path) -> Result<(), String>,
        make: impl FnOnce(&Path) -> Option<()>,
    ) -> Option<PathBuf> {
        let Self { recipe, hasher } = self;
        let cache = cache().expect("a cache directory");
        let lock = File::create(cache.join(format!("{recipe}.lock"))).expect("the lock of a recipe");
        lock.lock().expect("the lock of a recipe");
        let dir = cache.join(format!("{recipe}-{:016x}", hasher.finish()));
        if dir.join(DONE).exists() {
            match check(&dir) {
                Ok(()) => return Some(dir),
                Err(error) => println!("{} is made anew: {error}", dir.display()),
            }
        }
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{}: {error}", dir.display()),
            _ => {}
        }
        fs::create_dir(&dir).expect("a cached directory");
        make(&dir)?;
        File::create(dir.join(DONE)).expect("the mark of a complete directory");
        Some(dir)
    }
}

/// `$XDG_CACHE_HOME/clade`, or `~/.cache/clade`.
fn cache() -> io::Result<PathBuf> {
    let named = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || named("HOME").map(|home| home.join(".cache"));
    let dir = named("XDG_CACHE_HOME").or_else(home).unwrap_or_else(std::env::temp_dir).join("clade");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: &str = "cache-test";

    /// A key that no other run has: the cache outlives this process.
    fn key(text: &str) -> CacheKey {
        CacheKey::new(RECIPE, 1).text(&format!("{} {text}", std::process::id()))
    }

    fn content(dir: &Path) -> String {
        fs::read_to_string(dir.join("content")).unwrap_or_default()
    }

    fn fill(dir: &Path, text: &str) -> Option<()> {
        assert!(!dir.join("content").exists(), "the directory is empty");
        fs::write(dir.join("content"), text).ok()
    }

    fn has(wanted: &str) -> impl Fn(&Path) -> Result<(), String> {
        move |dir| (content(dir) == wanted).then_some(()).ok_or_else(|| format!("not {wanted}"))
    }

    #[test]
    fn a_directory_is_made_once_and_again_if_it_is_refused_or_incomplete() {
        let first = key("a").get(has("1"), |dir| fill(dir, "1")).unwrap();
        let again = key("a").get(has("1"), |_| panic!("it is there")).unwrap();
        assert_eq!((&first, content(&again).as_str()), (&again, "1"));
        let other = key("b").get(has("1"), |dir| fill(dir, "2")).unwrap();
        assert!(other != first && content(&other) == "2");
        let refused = key("a").get(has("3"), |dir| fill(dir, "3")).unwrap();
        assert_eq!((&refused, content(&refused).as_str()), (&first, "3"));
        // A process that was killed has left a part of it.
        fs::remove_file(first.join(DONE)).unwrap();
        let whole = key("a").get(|_| panic!("it is incomplete"), |dir| fill(dir, "4")).unwrap();
        assert_eq!(content(&whole), "4");
        assert!(key("c").get(has(""), |_| None).is_none());
        for name in ["a", "b", "c"] {
            let CacheKey { recipe, hasher } = key(name);
            let _ = fs::remove_dir_all(cache().unwrap().join(format!("{recipe}-{:016x}", hasher.finish())));
        }
    }
}
