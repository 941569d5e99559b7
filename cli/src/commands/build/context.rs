//! The directory of a build, for `COPY`. No path leaves it, and no link out of it is followed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use clade_oci::{Ignore, Pattern};

use super::recipe::read_text;
use crate::commands::Failure;

const IGNORE_FILE: &str = ".dockerignore";
/// Most entries of one source, and levels of directories.
const MAX_ENTRIES: usize = 100_000;
const MAX_DEPTH: usize = 128;

/// The kind of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ContextKind {
    File,
    Dir,
    /// A link, and its target.
    Link(String),
}

/// An entry of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContextEntry {
    /// Its path.
    pub(super) path: PathBuf,
    /// Its path below the source; empty for the source itself.
    pub(super) below: String,
    pub(super) kind: ContextKind,
}

/// A source named by a word of `COPY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContextSource {
    /// Its last name; empty for the directory itself.
    pub(super) name: String,
    pub(super) is_dir: bool,
    /// Its entries, each directory before its contents.
    pub(super) entries: Vec<ContextEntry>,
}

/// The directory of a build.
#[derive(Debug)]
pub(super) struct BuildContext {
    root: PathBuf,
    ignore: Ignore,
}

pub(super) fn named(path: &Path) -> impl FnOnce(io::Error) -> Failure {
    let name = path.display().to_string();
    move |error| Failure::input(anyhow::Error::new(error).context(name))
}

fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

impl BuildContext {
    /// Opens the directory of a build by `dockerfile`. As with Docker, a file beside that, `DOCKERFILE.dockerignore`,
    /// is read instead of the directory's.
    pub(super) fn open(dir: &Path, dockerfile: &Path) -> Result<Self, Failure> {
        let root = dir.canonicalize().map_err(named(dir))?;
        let mut own = dockerfile.as_os_str().to_owned();
        own.push(IGNORE_FILE);
        for path in [PathBuf::from(own), root.join(IGNORE_FILE)] {
            match path.symlink_metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(named(&path)(error)),
                Ok(_) => {
                    let refused = |error| Failure::input(error).named(&path.display().to_string());
                    let ignore = Ignore::parse(&read_text(&path)?).map_err(refused)?;
                    return Ok(Self { root, ignore });
                }
            }
        }
        Ok(Self { root, ignore: Ignore::default() })
    }

    /// Returns the sources of a word of `COPY`: one path, or the matches of a pattern.
    pub(super) fn sources(&self, word: &str) -> Result<Vec<ContextSource>, Failure> {
        let pattern = Pattern::parse(word).map_err(Failure::input)?;
        let found = match pattern.path() {
            Some(path) => vec![path],
            None => {
                let mut found = Vec::new();
                self.matching(&pattern, "", &mut found)?;
                found
            }
        };
        let found = found.iter().filter(|path| !self.leaves_out_all(path)).map(|path| self.source(path));
        let sources: Vec<ContextSource> = found.collect::<Result<_, _>>()?;
        // Of a directory that is ignored, what is not may be left.
        let sources: Vec<ContextSource> = sources.into_iter().filter(|source| !source.entries.is_empty()).collect();
        if sources.is_empty() {
            let text =
                format!("{word:?} names nothing in the directory of the build that {IGNORE_FILE} does not leave out");
            return Err(Failure::input(anyhow!(text)));
        }
        Ok(sources)
    }

    /// Returns whether a path and everything below it is ignored, as far as that is known without a look at them.
    fn leaves_out_all(&self, path: &str) -> bool {
        !self.ignore.has_exceptions() && self.ignore.leaves_out(path)
    }

    /// Entries of a directory by name. No link is followed.
    fn names(&self, dir: &str) -> Result<Vec<(String, fs::FileType)>, Failure> {
        let path = self.root.join(dir);
        let mut all = Vec::new();
        for entry in fs::read_dir(&path).map_err(named(&path))? {
            let entry = entry.map_err(named(&path))?;
            let kind = entry.file_type().map_err(named(&path))?;
            let name = entry.file_name().into_string();
            let name =
                name.map_err(|name| Failure::input(anyhow!("file name {name:?} in {} is not UTF-8", path.display())))?;
            all.push((name, kind));
            if all.len() > MAX_ENTRIES {
                return Err(Failure::input(anyhow!("{} has more than {MAX_ENTRIES} entries", path.display())));
            }
        }
        all.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(all)
    }

    /// Collects the paths that a pattern matches. A match includes everything below it. Directories that are ignored,
    /// or too deep for the pattern, are not read: they may be unreadable.
    fn matching(&self, pattern: &Pattern, dir: &str, found: &mut Vec<String>) -> Result<(), Failure> {
        let depth = dir.split('/').filter(|name| !name.is_empty()).count();
        if depth == MAX_DEPTH {
            return Err(Failure::input(anyhow!("{dir}: more than {MAX_DEPTH} levels")));
        }
        for (name, kind) in self.names(dir)? {
            let path = join(dir, &name);
            if pattern.matches(&path) {
                found.push(path);
            } else if kind.is_dir()
                && pattern.depth().is_none_or(|most| depth + 1 < most)
                && !self.leaves_out_all(&path)
            {
                self.matching(pattern, &path, found)?;
            }
        }
        Ok(())
    }

    /// The source at a path, without entries if all of it is ignored.
    fn source(&self, path: &str) -> Result<ContextSource, Failure> {
        let given = self.root.join(path);
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let is_dir = given.symlink_metadata().is_ok_and(|found| found.is_dir());
        // Nothing below it is another exception's: a link's target has a path of its own.
        if !path.is_empty() && !is_dir && self.ignore.leaves_out(path) {
            return Ok(ContextSource { name, is_dir, entries: Vec::new() });
        }
        // The target of a link on the way has to be in the directory, too.
        let real = given.canonicalize().map_err(named(&given))?;
        let below = real.strip_prefix(&self.root).ok().and_then(Path::to_str);
        let below = below.ok_or_else(|| Failure::input(anyhow!("{path:?} leads out of the directory of the build")))?;
        let (below, is_dir) = (below.to_owned(), real.is_dir());
        let mut entries = Vec::new();
        self.walk(&below, (&below, 0), &mut entries)?;
        Ok(ContextSource { name, is_dir, entries })
    }

    /// Adds an entry with its contents. `root` is the source.
    fn walk(&self, root: &str, (path, depth): (&str, usize), all: &mut Vec<ContextEntry>) -> Result<(), Failure> {
        let is_left_out = !path.is_empty() && self.ignore.leaves_out(path);
        if is_left_out && !self.ignore.has_exceptions() {
            return Ok(());
        }
        if depth > MAX_DEPTH || all.len() >= MAX_ENTRIES {
            return Err(Failure::input(anyhow!("{path}: more than {MAX_DEPTH} levels or {MAX_ENTRIES} entries")));
        }
        let place = self.root.join(path);
        let found = place.symlink_metadata().map_err(named(&place))?.file_type();
        let kind = if found.is_dir() {
            ContextKind::Dir
        } else if found.is_file() {
            ContextKind::File
        } else if found.is_symlink() {
            let target = fs::read_link(&place).map_err(named(&place))?;
            let target = target.into_os_string().into_string();
            ContextKind::Link(
                target.map_err(|_| Failure::input(anyhow!("the target of the link {path} is not UTF-8")))?,
            )
        } else {
            return Err(Failure::input(anyhow!("{path} is neither a file, a directory nor a link")));
        };
        let is_dir = kind == ContextKind::Dir;
        if !is_left_out {
            let below = path.strip_prefix(root).unwrap_or_default().trim_start_matches('/').to_owned();
            all.push(ContextEntry { path: place, below, kind });
        }
        if is_dir {
            for (name, _) in self.names(path)? {
                self.walk(root, (&join(path, &name), depth + 1), all)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn context(ignore: &str) -> (tempfile::TempDir, BuildContext) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("context");
        fs::create_dir_all(root.join("src/deep")).unwrap();
        for file in ["a.txt", "b.txt", "src/main", "src/deep/x.log", "src/keep.log"] {
            fs::write(root.join(file), file).unwrap();
        }
        fs::write(dir.path().join("outside"), "secret").unwrap();
        symlink("../../outside", root.join("src/out")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("src", root.join("same")).unwrap();
        fs::write(root.join(IGNORE_FILE), ignore).unwrap();
        let context = BuildContext::open(&root, &root.join("Dockerfile")).unwrap();
        (dir, context)
    }

    #[test]
    fn a_dockerfiles_own_list_is_read_instead_of_the_directorys() {
        let (dir, _) = context("src");
        let (root, other) = (dir.path().join("context"), dir.path().join("prod.Dockerfile"));
        fs::write(dir.path().join("prod.Dockerfile.dockerignore"), "*.txt").unwrap();
        let own = BuildContext::open(&root, &other).unwrap();
        assert!(own.sources("a.txt").is_err() && own.sources("src/main").is_ok());
        let directorys = BuildContext::open(&root, &root.join("Dockerfile")).unwrap();
        assert!(directorys.sources("a.txt").is_ok() && directorys.sources("src/main").is_err());
    }

    fn below(context: &BuildContext, word: &str) -> Vec<String> {
        let of = |source: ContextSource| {
            let prefix = source.name;
            source.entries.into_iter().map(move |entry| format!("{prefix}:{}", entry.below))
        };
        context.sources(word).unwrap().into_iter().flat_map(of).collect()
    }

    #[test]
    fn paths_and_patterns_name_what_is_there() {
        let (_dir, context) = context("");
        assert_eq!(below(&context, "/a.txt"), ["a.txt:"]);
        assert_eq!(below(&context, "*.txt"), ["a.txt:", "b.txt:"]);
        let src = ["src:", "src:deep", "src:deep/x.log", "src:keep.log", "src:main", "src:out"];
        assert_eq!(below(&context, "src/"), src);
        // Links are copied as links; their targets are not read.
        let out = context.sources("src").unwrap()[0].entries.pop_out();
        assert_eq!(out, ContextKind::Link("../../outside".to_owned()));
        assert_eq!(below(&context, "same"), src.map(|path| path.replace("src:", "same:")));
        assert!(below(&context, ".").contains(&":src/main".to_owned()));
    }

    trait PopOut {
        fn pop_out(&self) -> ContextKind;
    }

    impl PopOut for Vec<ContextEntry> {
        fn pop_out(&self) -> ContextKind {
            self.iter().find(|entry| entry.below == "out").unwrap().kind.clone()
        }
    }

    #[test]
    fn nothing_outside_is_taken() {
        let (_dir, context) = context("");
        for word in
            ["..", "../outside", "src/../../outside", "/../outside", "src/out", "up", "up/outside", "nothing", "*.c"]
        {
            let failure = context.sources(word).unwrap_err().to_string();
            assert!(!failure.contains("secret"), "{word}: {failure}");
        }
    }

    #[test]
    fn what_is_ignored_is_left_out() {
        let (_dir, ignoring) = context("*.txt\n**/*.log\nup\nsame\n");
        assert_eq!(below(&ignoring, "src"), ["src:", "src:deep", "src:main", "src:out"]);
        assert!(ignoring.sources("a.txt").is_err() && ignoring.sources("*.txt").is_err());
        let (_dir, excepting) = context("*\n!src/deep\n");
        let all = below(&excepting, ".");
        assert_eq!(all, [":", ":src/deep", ":src/deep/x.log"]);
    }

    #[test]
    fn a_pattern_takes_what_exceptions_leave() {
        let (_dir, context) = context("*.txt\n!b.txt\n");
        assert_eq!(below(&context, "*.txt"), ["b.txt:"]);
        assert!(context.sources("a.txt").is_err());
        let (_dir, allowing) = self::context("*\n!src/deep\n!b.txt\n");
        assert_eq!(below(&allowing, "*"), ["b.txt:", "src:deep", "src:deep/x.log"]);
    }

    /// They may be another user's, or have names that are no text.
    #[test]
    fn a_pattern_reads_no_directory_that_it_cannot_match() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let (dir, context) = context("data\n");
        let unreadable = |name: &str| {
            let place = dir.path().join("context").join(name);
            fs::create_dir(&place).unwrap();
            fs::write(place.join(OsStr::from_bytes(b"\xff")), "").unwrap();
        };
        unreadable("data");
        assert_eq!(below(&context, "**/main"), ["main:"]);
        assert_eq!(below(&context, "*.txt"), ["a.txt:", "b.txt:"]);
        unreadable("other");
        assert_eq!(below(&context, "*.txt"), ["a.txt:", "b.txt:"]);
        assert!(context.sources("*/main").unwrap_err().to_string().contains("UTF-8"));
    }

    #[test]
    fn a_pipe_is_no_file() {
        let (dir, context) = context("");
        let done = std::process::Command::new("mkfifo").arg(dir.path().join("context/src/pipe")).status();
        assert!(done.unwrap().success());
        let failure = context.sources("src").unwrap_err().to_string();
        assert!(failure.contains("src/pipe"), "{failure}");
    }
}
