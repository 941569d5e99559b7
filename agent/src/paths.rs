//! Paths of requests, and the directories on the way to them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, fchown, lchown};
use std::path::{Component, Path, PathBuf};

use crate::users::User;

/// The absolute path of a request's path: `~` is the user's home, and relative paths begin there.
/// An empty path means `workdir`.
///
/// # Errors
/// When it is the home of another user.
pub(crate) fn resolve(path: &str, user: &User, workdir: Option<&str>) -> Result<PathBuf, String> {
    let path = if path.is_empty() { workdir.unwrap_or_default() } else { path };
    let relative = match path.strip_prefix('~') {
        Some("") => "",
        Some(rest) if rest.starts_with('/') => rest.trim_start_matches('/'),
        Some(_) => return Err(format!("the path '{path}' names the home of another user")),
        None => path,
    };
    let mut absolute = PathBuf::from("/");
    // A `..` behind a directory that is made on the way would lead to another one, which exists.
    for part in Path::new(&user.home).join(relative).components() {
        match part {
            Component::ParentDir => drop(absolute.pop()),
            Component::Normal(name) => absolute.push(name),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(absolute)
}

/// Makes a user the owner of an open file. Without root's rights, the agent stays the owner.
pub(crate) fn fchown_to(file: &File, user: &User) -> io::Result<()> {
    if rustix::process::geteuid().is_root() { fchown(file, Some(user.uid), Some(user.gid)) } else { Ok(()) }
}

/// The same of a new directory, without following a link: another program may have put one in its place.
fn lchown_to(path: &Path, user: &User) -> io::Result<()> {
    if rustix::process::geteuid().is_root() { lchown(path, Some(user.uid), Some(user.gid)) } else { Ok(()) }
}

/// Makes a directory and its parents. The user owns the new ones.
pub(crate) fn make_dirs(path: &Path, user: &User) -> io::Result<()> {
    let mut missing = Vec::new();
    for dir in path.ancestors() {
        match fs::metadata(dir) {
            Ok(found) if found.is_dir() => break,
            Ok(_) => {
                let why = format!("{} is no directory", dir.display());
                return Err(io::Error::new(io::ErrorKind::NotADirectory, why));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(dir),
            Err(error) => return Err(error),
        }
    }
    for dir in missing.into_iter().rev() {
        match fs::DirBuilder::new().mode(0o755).create(dir) {
            Ok(()) => lchown_to(dir, user)?,
            // Another request made it first, and may not have changed its owner yet. A link of another
            // program is not followed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = fs::symlink_metadata(dir)?;
                let is_new = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw();
                if is_new && dir.file_name().is_some() {
                    lchown_to(dir, user)?;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_begin_at_home() {
        let user = User { name: "ann".into(), uid: 1, gid: 1, home: "/home/ann".into(), groups: vec![1] };
        let of = |path: &str, dir: Option<&str>| resolve(path, &user, dir).map(|path| path.display().to_string());
        assert_eq!(of("", None).unwrap(), "/home/ann");
        assert_eq!(of("", Some("/srv")).unwrap(), "/srv");
        assert_eq!(of("~", None).unwrap(), "/home/ann");
        assert_eq!(of("~//a", None).unwrap(), "/home/ann/a");
        assert_eq!(of("a/../../b", None).unwrap(), "/home/b");
        assert_eq!(of("/a/../b/./c//d/", None).unwrap(), "/b/c/d");
        assert_eq!(of("/../..", None).unwrap(), "/");
        of("~bob/a", None).unwrap_err();
    }

    #[test]
    fn new_directories_alone_get_their_user() {
        if !rustix::process::geteuid().is_root() {
            return clade_test_support::skipped("only root can give directories away");
        }
        let dir = tempfile::tempdir().unwrap();
        let owner = |path: &Path| fs::symlink_metadata(path).unwrap().uid();
        let user = User { name: "ann".into(), uid: 1000, gid: 1000, home: "/".into(), groups: Vec::new() };
        make_dirs(&dir.path().join("new/deep"), &user).unwrap();
        assert_eq!([owner(&dir.path().join("new")), owner(&dir.path().join("new/deep"))], [1000, 1000]);
        // An existing directory keeps its owner, by any path that leads to it.
        make_dirs(&dir.path().join("other/.."), &user).unwrap();
        assert_eq!([owner(dir.path()), owner(&dir.path().join("other"))], [0, 1000]);
        fs::create_dir(dir.path().join("kept")).unwrap();
        make_dirs(&dir.path().join("kept"), &user).unwrap();
        assert_eq!(owner(&dir.path().join("kept")), 0);
    }
}
