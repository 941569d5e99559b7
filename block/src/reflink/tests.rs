//! The order of steps, which needs no file system with reflinks: a copy in place of the clone.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::steps_trace::testing::traced;
use crate::testutil::{read, write};
use crate::{Disk, DiskConfig};

const SIZE: u64 = 4 * CLUSTER;

struct Bench {
    dir: tempfile::TempDir,
    reflink: ReflinkImage,
    overlay: Arc<IoFile>,
}

fn open(path: &Path) -> Arc<IoFile> {
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Arc::new(IoFile::read_write(file, path, CachePolicy::Host))
}

impl Bench {
    /// An image of ones, with twos in an overlay for the second cluster, and a new image that is a
    /// copy of it.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, vec![1; SIZE as usize]).unwrap();
        let overlay = open(&dir.path().join("overlay"));
        overlay.write_now(&[2; CLUSTER as usize], CLUSTER).unwrap();
        let base = open(&path);
        let (beside, name) = place(&path).unwrap();
        let new = beside.new_image(SIZE, &path, CachePolicy::Host).unwrap();
        new.write_now(&[1; SIZE as usize], 0).unwrap();
        let reflink = ReflinkImage {
            beside,
            name,
            base,
            size: SIZE,
            policy: CachePolicy::Host,
            file: None,
            next: Some(Arc::new(new)),
            moved: Vec::new(),
            whole: false,
            broken: false,
            writing: None,
        };
        Self { dir, reflink, overlay }
    }

    fn begin(&mut self, moved: Range<u64>) {
        let mut map = BlockMap::new(SIZE / CLUSTER, ClusterSource::File(Arc::clone(&self.reflink.base)));
        map.insert(1..2, ClusterSource::File(Arc::clone(&self.overlay)));
        let (moved, synced) = (vec![moved], vec![Arc::clone(&self.overlay)]);
        self.reflink.writing =
            Some(ReflinkWrite { moved, synced, map, is_to_clone: false, dirty: false, step: ReflinkStep::Data });
    }

    fn inode(&self) -> u64 {
        fs::metadata(self.dir.path().join("disk.img")).unwrap().ino()
    }

    /// The next file to sync.
    fn next(&mut self) -> Option<(Arc<IoFile>, bool)> {
        match self.reflink.next().unwrap() {
            Some(Request::Sync { file, all }) => Some((file, all)),
            None => None,
            other => panic!("{other:?}"),
        }
    }

    fn second_cluster(&self) -> u8 {
        fs::read(self.dir.path().join("disk.img")).unwrap()[CLUSTER as usize]
    }
}

#[test]
fn a_new_image_is_on_the_disk_before_it_has_the_name_and_the_name_after() {
    let mut bench = Bench::new();
    let (old, new) = (bench.inode(), bench.reflink.next.clone().unwrap());
    bench.begin(0..SIZE / CLUSTER);
    let (file, all) = bench.next().unwrap();
    assert!(Arc::ptr_eq(&file, &new) && all, "all of the new image, not {file:?}");
    assert_eq!((bench.inode(), bench.second_cluster()), (old, 1), "it has no name before that");
    let (file, all) = bench.next().unwrap();
    assert!(Arc::ptr_eq(&file, bench.reflink.beside.file()) && all, "then the directory, not {file:?}");
    assert!(bench.inode() != old && bench.second_cluster() == 2);
    assert!(bench.reflink.is_writing(), "it is not over before that is done");
    assert!(bench.next().is_none() && !bench.reflink.is_writing());
    // Changed clusters are written into the new image, and synced before the flush ends.
    bench.overlay.write_now(&[3; CLUSTER as usize], CLUSTER).unwrap();
    let named = bench.inode();
    bench.begin(1..2);
    let (file, all) = bench.next().unwrap();
    assert!(Arc::ptr_eq(&file, &new) && all);
    assert!(bench.reflink.is_writing(), "it is not over before that is done");
    assert!(bench.next().is_none() && !bench.reflink.is_writing());
    assert_eq!((bench.inode(), bench.second_cluster()), (named, 3));
}

#[test]
fn a_new_image_that_lacks_a_write_is_not_the_base() {
    let mut bench = Bench::new();
    bench.begin(0..SIZE / CLUSTER);
    assert!(bench.next().is_some());
    // The guest's write ends while the flush is on its way: its data are not in the image.
    bench.reflink.moved(2..3);
    while bench.next().is_some() {}
    assert!(bench.reflink.is_image() && !bench.reflink.is_writing());
    assert!(bench.reflink.take_over().is_none(), "the third cluster is in an overlay alone");
    // The same after so many writes that they are not noted one by one.
    bench.reflink.replaced();
    assert!(bench.reflink.take_over().is_none());
    // A flush that writes all of it.
    bench.reflink.whole = false;
    bench.begin(2..3);
    while bench.next().is_some() {}
    let base = bench.reflink.take_over().unwrap();
    assert!(Arc::ptr_eq(&base, &bench.reflink.base));
}

#[test]
fn a_new_image_that_cannot_be_synced_gets_no_name() {
    let mut bench = Bench::new();
    let old = bench.inode();
    bench.begin(0..SIZE / CLUSTER);
    assert!(bench.next().is_some());
    bench.reflink.give_up(true);
    assert_eq!((bench.inode(), bench.second_cluster()), (old, 1));
    assert!(bench.reflink.next.is_none() && bench.reflink.whole && bench.reflink.is_broken());
    let map = BlockMap::new(SIZE / CLUSTER, ClusterSource::File(Arc::clone(&bench.overlay)));
    assert!(bench.reflink.begin(&map, true).is_err(), "the system says it once");
}

/// FICLONE writes back the image's pages on the device's thread, unless they were synced before.
#[test]
fn an_image_is_synced_before_its_clone_and_a_journal_follows_one_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    fs::write(&path, vec![1; SIZE as usize]).unwrap();
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    if disk.durability.reflink().is_some() {
        return clade_test_support::skipped("the temporary directory has reflinks");
    }
    let (beside, name) = place(&path).unwrap();
    let base = Arc::clone(disk.chain.base().unwrap());
    let (file, next, writing) = (None, None, None);
    let (size, policy, moved) = (SIZE, CachePolicy::Host, Vec::new());
    let reflink =
        ReflinkImage { beside, name, base, size, policy, file, next, moved, whole: true, broken: false, writing };
    disk.durability.set_reflink(reflink);
    write(&mut disk, 0, &[2; CLUSTER as usize]);
    drop(disk.fork());
    write(&mut disk, CLUSTER, &[3; CLUSTER as usize]);
    let (flushed, steps) = traced(None, || disk.flush_now());
    flushed.unwrap();
    let at = |what: &str| steps.iter().position(|step| step == what).unwrap_or_else(|| panic!("{what}: {steps:?}"));
    assert!(at("engine: sync disk.img") < at("clone disk.img"), "{steps:?}");
    assert!(at("clone disk.img") < at("mkdir disk.img.clade-journal"), "{steps:?}");
    assert!(disk.durability.reflink().is_none() && !disk.health().lost);
    // Also what was written in place before the fork: the journal has the image's state.
    drop(disk);
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    assert_eq!(read(&mut disk, 0, 2 * CLUSTER as usize), [[2; CLUSTER as usize], [3; CLUSTER as usize]].concat());
}
