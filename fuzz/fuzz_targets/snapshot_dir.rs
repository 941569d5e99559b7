//! Any directory in a snapshot's place, made from a valid one: files missing, cut short, lengthened
//! by holes, changed with their checksums corrected, or replaced by links, pipes and directories.
//! Opening, reading, verifying, restoring and saving over it end, and touch no file outside.
#![no_main]

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clade_memory::{GuestRam, PageRange, Quiesced, RamImage, RamLayout, Store};
use clade_snapshot::format::{Manifest, checksum};
use clade_snapshot::{
    Compression, DiskToSave, Load, PageContent, ParentDirs, Save, SaveProgress, Snapshot, Space, record_working_set,
    verify,
};
use libfuzzer_sys::{arbitrary, fuzz_target};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 1 << 20;
const FILES: [&str; 7] =
    ["manifest.json", "state", "memory.index", "memory.data", "disk-0.index", "disk-0.data", "warm"];
/// The contents of a file outside, which must not change.
const OUTSIDE: &[u8] = b"outside";

#[derive(arbitrary::Arbitrary, Debug)]
enum Change {
    Remove(u8),
    Cut(u8, u16),
    /// With a hole, to so many MiB.
    Lengthen(u8, u16),
    Flip(u8, u16, u8),
    /// The same, with the file's final checksum corrected.
    Forge(u8, u16, Vec<u8>),
    /// Change a number in the manifest, by its place among its numbers.
    Number(u8, u64),
    /// Correct the manifest's checksums and lengths of the index and the state.
    Settle,
    Pipe(u8),
    Link(u8, u8),
    Dir(u8),
    /// A leftover of a save: a link to the file outside, or a directory with links in it.
    Leftover(u8, bool),
    /// Replace a file by a copy of another.
    Copy(u8, u8),
}

struct Disk;

impl Space for Disk {
    fn bytes(&self) -> u64 {
        9 * 4096
    }
    fn runs(&self) -> std::io::Result<Vec<(PageRange, PageContent)>> {
        Ok(vec![(PageRange::new(0, 3), PageContent::Zero), (PageRange::new(3, 9), PageContent::Data)])
    }
    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        bytes.fill(page as u8);
        Ok(())
    }
}

struct World {
    store: Store,
    image: RamImage,
    dir: tempfile::TempDir,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let store = Store::open_small().expect("a store");
        let ram = GuestRam::reserve(&RamLayout::new(RAM).expect("a layout"), &store).expect("memory");
        ram.populate().expect("memory");
        for page in [3u64, 4, 90] {
            ram.memory().write_slice(&[page as u8; 4096], GuestAddress(page * 4096)).expect("memory");
        }
        let (image, _) = ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).expect("an image");
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
        let world = World { store, image, dir };
        for (name, compression) in [("plain", Compression::None), ("packed", Compression::Zstd)] {
            let at = world.dir.path().join(name);
            world.save(&at, compression).expect("a snapshot");
            let manifest = fs::read(at.join(FILES[0])).expect("its manifest");
            let id = Manifest::decode(&manifest).expect("a manifest").id;
            record_working_set(&at, id, &[PageRange::new(3, 5)]).expect("a record");
        }
        fs::create_dir(world.dir.path().join("outside")).expect("a directory");
        for name in FILES {
            fs::write(world.dir.path().join("outside").join(name), OUTSIDE).expect("a file");
        }
        world
    })
}

impl World {
    fn save(&self, at: &Path, compression: Compression) -> Result<(), clade_snapshot::Error> {
        let disks = [DiskToSave { name: "root", space: &Disk }];
        let sections: &[(&str, &[u8])] = &[("config", b"{}"), ("vcpus", &[1, 2, 3])];
        let save = Save { memory: &self.image, disks: &disks, sections, base: None, compression, replace: false };
        save.to(at, &SaveProgress::none()).map(drop)
    }
}

fn seal(bytes: &mut [u8]) {
    if let Some(at) = bytes.len().checked_sub(8) {
        let sum = checksum(&bytes[..at]);
        bytes[at..].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Applies `change` to the manifest's JSON text up to its checksum, and corrects that.
fn reseal(path: &Path, change: impl FnOnce(&mut serde_json::Value)) -> Option<()> {
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    value.as_object_mut()?.remove("checksum");
    change(&mut value);
    let text = serde_json::to_string_pretty(&value).ok()?;
    fs::write(path, Manifest::sealed(&text)).ok()
}

fn numbers<'a>(value: &'a mut serde_json::Value, out: &mut Vec<&'a mut serde_json::Value>) {
    match value {
        serde_json::Value::Number(_) => out.push(value),
        serde_json::Value::Array(all) => all.iter_mut().for_each(|value| numbers(value, out)),
        serde_json::Value::Object(all) => all.values_mut().for_each(|value| numbers(value, out)),
        _ => {}
    }
}

fn sum_of(path: &Path) -> Option<(u64, String)> {
    let bytes = fs::read(path).ok()?;
    let sum = u64::from_le_bytes(bytes.last_chunk::<8>().copied()?);
    Some((bytes.len() as u64, format!("{sum:016x}")))
}

fn is_file(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|meta| meta.is_file() && meta.len() < 1 << 20)
}

fn change(at: &Path, change: Change) -> Option<()> {
    let path = |n: u8| at.join(FILES[usize::from(n) % FILES.len()]);
    let gone = |path: &PathBuf| fs::remove_file(path).or_else(|_| fs::remove_dir(path)).ok();
    let open = |n: u8| {
        let path = path(n);
        is_file(&path).then(|| fs::OpenOptions::new().read(true).write(true).open(path).ok()).flatten()
    };
    match change {
        Change::Remove(n) => gone(&path(n)),
        Change::Cut(n, len) => open(n)?.set_len(u64::from(len)).ok(),
        Change::Lengthen(n, mib) => open(n)?.set_len(u64::from(mib) << 20).ok(),
        Change::Flip(n, offset, bits) => {
            let file = open(n)?;
            let mut byte = [0];
            file.read_exact_at(&mut byte, u64::from(offset)).ok()?;
            file.write_all_at(&[byte[0] ^ bits], u64::from(offset)).ok()
        }
        Change::Forge(n, offset, with) => {
            let path = path(n);
            let mut bytes = is_file(&path).then(|| fs::read(&path).ok()).flatten()?;
            let from = usize::from(offset) % bytes.len().max(1);
            bytes.iter_mut().skip(from).zip(with).for_each(|(byte, with)| *byte = with);
            seal(&mut bytes);
            fs::write(path, bytes).ok()
        }
        Change::Number(n, number) => {
            let manifest = path(0);
            is_file(&manifest).then_some(())?;
            reseal(&manifest, |value| {
                let mut all = Vec::new();
                numbers(value, &mut all);
                let count = all.len().max(1);
                if let Some(value) = all.get_mut(usize::from(n) % count) {
                    **value = number.into();
                }
            })
        }
        Change::Settle => {
            let manifest = path(0);
            is_file(&manifest).then_some(())?;
            let known = |name: &str| is_file(&at.join(name)).then(|| sum_of(&at.join(name))).flatten();
            let (state, memory, disk) = (known("state"), known("memory.index"), known("disk-0.index"));
            reseal(&manifest, |value| {
                let mut put = |path: &str, len: &str, sum: &str, found: Option<(u64, String)>| {
                    if let (Some(entry), Some((bytes, checksum))) = (value.pointer_mut(path), found)
                        && let Some(entry) = entry.as_object_mut()
                    {
                        entry.insert(len.to_owned(), bytes.into());
                        entry.insert(sum.to_owned(), checksum.into());
                    }
                };
                put("/state", "bytes", "checksum", state);
                put("/memory/layer", "index_bytes", "index_checksum", memory);
                put("/disks/0/layer", "index_bytes", "index_checksum", disk);
            })
        }
        Change::Pipe(n) => {
            gone(&path(n));
            mknodat(CWD, path(n), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).ok()
        }
        Change::Link(n, to) => {
            gone(&path(n));
            let to = FILES[usize::from(to) % FILES.len()];
            symlink(world().dir.path().join("outside").join(to), path(n)).ok()
        }
        Change::Dir(n) => {
            gone(&path(n));
            fs::create_dir(path(n)).ok()
        }
        Change::Leftover(n, link) => {
            let leftover = at.with_file_name(format!(".it.clade-{n:016x}"));
            let outside = world().dir.path().join("outside");
            if link {
                return symlink(outside, leftover).ok();
            }
            fs::create_dir(&leftover).ok()?;
            FILES.iter().try_for_each(|name| symlink(outside.join(name), leftover.join(name))).ok()
        }
        Change::Copy(n, from) => {
            let bytes = is_file(&path(from)).then(|| fs::read(path(from)).ok()).flatten()?;
            gone(&path(n));
            fs::write(path(n), bytes).ok()
        }
    }
}

fuzz_target!(|input: (bool, Vec<Change>)| {
    let (packed, changes) = input;
    let world = world();
    let begun = Instant::now();
    let stage = tempfile::tempdir_in(world.dir.path()).expect("a directory");
    let at = stage.path().join("it");
    fs::create_dir(&at).expect("a directory");
    let from = world.dir.path().join(if packed { "packed" } else { "plain" });
    for name in FILES {
        fs::copy(from.join(name), at.join(name)).expect("a copy");
    }
    for step in changes.into_iter().take(12) {
        let _ = change(&at, step);
    }
    let _ = clade_snapshot::show(&at, &ParentDirs::siblings());
    if let Ok(snapshot) = Snapshot::open(&at, &ParentDirs::siblings()) {
        let warm = snapshot.working_set().ok().flatten().unwrap_or_default();
        // The snapshot may claim more memory than this host should allocate.
        let small = snapshot.layout().is_ok_and(|layout| layout.bytes() <= 64 << 20);
        for load in [Load::Lazy, Load::WorkingSet(warm), Load::Preload] {
            if small && let Ok(image) = snapshot.restore_ram(&world.store, &load) {
                let ram = GuestRam::reserve(image.layout(), &world.store).expect("memory");
                let _ = ram.adopt(&image);
            }
        }
        let _ = verify(&at, &ParentDirs::siblings());
    }
    let _ = world.save(&at, Compression::None);
    for name in FILES {
        let outside = fs::read(world.dir.path().join("outside").join(name));
        assert!(outside.is_ok_and(|bytes| bytes == OUTSIDE), "{name} outside has changed");
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
});
