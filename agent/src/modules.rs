//! Kernel modules in the initramfs: drivers of the root's disk and of vsock.
//!
//! The initramfs contains them uncompressed, with names in load order. Their parameters are on the
//! kernel's command line; the kernel itself applies those only to built-in drivers.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::system::finit_module;

use crate::log::log;

/// The directory of modules: `000-first.ko`, `001-second.ko`.
const MODULES: &str = "/lib/clade/modules";
/// Timeout for a disk to appear after its driver was loaded.
const DISK_TIMEOUT: Duration = Duration::from_secs(10);
const DISK_POLL: Duration = Duration::from_millis(10);

/// The files in their order, and the names of the modules.
fn files(dir: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let name = |path: &Path| {
        let stem = path.file_name()?.to_str()?.strip_suffix(".ko")?;
        Some(stem.split_once('-')?.1.replace('-', "_"))
    };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    Ok(files.into_iter().filter_map(|path| Some((name(&path)?, path))).map(|(name, path)| (path, name)).collect())
}

/// The parameters for a module on the command line: `NAME.PARAMETER=VALUE`, without the name.
fn parameters(words: &[String], module: &str) -> String {
    let of_it = |word: &String| {
        let (name, rest) = word.split_once('.')?;
        (name.replace('-', "_") == module).then(|| rest.to_owned())
    };
    // The words after `--` belong to a program.
    let words = words.iter().take_while(|word| *word != "--");
    words.filter_map(of_it).collect::<Vec<_>>().join(" ")
}

/// Loads all modules of a directory by `load`. Returns the number of loaded modules, and the errors
/// of others: functions that do not need those still work.
fn load_all(dir: &Path, words: &[String], load: impl Fn(&File, &CString) -> io::Result<()>) -> (usize, Vec<String>) {
    let (mut count, mut failed) = (0, Vec::new());
    let files = files(dir).unwrap_or_else(|error| {
        failed.push(format!("{}: {error}", dir.display()));
        Vec::new()
    });
    for (path, name) in files {
        // Words of the command line do not contain a zero byte.
        let parameters = CString::new(parameters(words, &name)).unwrap_or_default();
        match File::open(&path).and_then(|file| load(&file, &parameters)) {
            Ok(()) => count += 1,
            // The module is built in, or was loaded before.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => count += 1,
            Err(error) => failed.push(format!("the module {name}: {error}")),
        }
    }
    (count, failed)
}

/// Loads the modules of the initramfs. Returns whether there were any.
pub(crate) fn load(words: &[String]) -> bool {
    let load = |file: &File, parameters: &CString| Ok(finit_module(file, parameters, 0)?);
    let (count, failed) = load_all(Path::new(MODULES), words, load);
    for why in &failed {
        log!("{why}");
    }
    count + failed.len() > 0
}

/// Waits for a disk whose driver was just loaded.
pub(crate) fn wait_for(device: &str) {
    let begun = Instant::now();
    while !Path::new(device).exists() && begun.elapsed() < DISK_TIMEOUT {
        sleep(DISK_POLL);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::Read;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_module_has_the_parameters_that_the_command_line_has_for_it() {
        let line = words(
            "quiet virtio_mmio.device=4K@0xd0000000:5 virtio-mmio.device=4K@0xd0001000:6 other.x=1 -- virtio_mmio.y=2",
        );
        assert_eq!(parameters(&line, "virtio_mmio"), "device=4K@0xd0000000:5 device=4K@0xd0001000:6");
        assert_eq!(parameters(&line, "virtio"), "");
        assert_eq!(parameters(&words("a.b a.c=d.e"), "a"), "b c=d.e");
    }

    #[test]
    fn modules_are_loaded_in_their_order_and_one_that_fails_stops_no_other() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["010-last.ko", "001-virtio-ring.ko", "000-virtio.ko", "002-bad.ko", "003-there.ko", "readme"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        let loaded = RefCell::new(Vec::new());
        let (count, failed) = load_all(dir.path(), &words("virtio_ring.x=1"), |mut file, parameters| {
            let mut name = String::new();
            file.read_to_string(&mut name)?;
            loaded.borrow_mut().push((name.clone(), parameters.to_str().unwrap().to_owned()));
            match name.as_str() {
                "002-bad.ko" => Err(io::ErrorKind::InvalidInput.into()),
                "003-there.ko" => Err(io::ErrorKind::AlreadyExists.into()),
                _ => Ok(()),
            }
        });
        let loaded = loaded.into_inner();
        let names: Vec<&str> = loaded.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["000-virtio.ko", "001-virtio-ring.ko", "002-bad.ko", "003-there.ko", "010-last.ko"]);
        assert_eq!((loaded[0].1.as_str(), loaded[1].1.as_str()), ("", "x=1"));
        assert!(count == 4 && failed.len() == 1 && failed[0].starts_with("the module bad: "), "{failed:?}");
        // A guest without modules.
        assert_eq!(load_all(&dir.path().join("none"), &[], |_, _| Ok(())), (0, Vec::new()));
        // The kernel refuses a file that is not a module, or this process may not load any.
        let refused = finit_module(File::open(dir.path().join("readme")).unwrap(), c"", 0);
        assert!(refused.is_err());
    }
}
