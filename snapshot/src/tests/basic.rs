//! What is saved comes back.

use std::fs;

use clade_memory::Store;

use super::support::*;
use crate::*;

const LOADS: [Load; 3] = [Load::Lazy, Load::Preload, Load::Warm(Vec::new())];

#[test]
fn a_full_snapshot_comes_back_in_every_way() {
    let store = Store::open().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("one");
    let ram = born(&layout(), &store);
    for page in [0, 3, 5, 69, 70, 71, 100, 202] {
        put(&ram, page, page as u8 + 1);
    }
    let mut disk = ModelDisk::new(3 * 4096 + 100);
    disk.write(4090, b"over the edge");
    disk.write(3 * 4096 + 98, b"ab");
    let image = freeze(&ram);
    for compression in [Compression::None, Compression::Zstd] {
        let disks = [DiskToSave { name: "root", space: &disk }];
        let saved = Saving { disks: &disks, compression, ..Saving::default() }.save(&image, &at).unwrap();
        assert_eq!(saved.data_pages + saved.zero_pages, 203 + 4);
        for load in &LOADS {
            assert_eq!(restored(&at, &store, load), contents(&ram), "{compression:?} {load:?}");
        }
        let snapshot = Snapshot::open(&at).unwrap();
        assert_eq!(
            (snapshot.id(), snapshot.section("vcpus"), snapshot.section("vm")),
            (saved.id, Some(&[1, 2, 3][..]), None)
        );
        let disks = snapshot.disks();
        let mut bytes = vec![1; disk.bytes.len()];
        disks[0].read_at(0, &mut bytes).unwrap();
        assert_eq!((disks[0].name(), bytes), ("root", disk.bytes.clone()));
        let mut some = [0; 13];
        disks[0].read_at(4090, &mut some).unwrap();
        assert_eq!(&some, b"over the edge");
        assert!(disks[0].read_at(3 * 4096 + 90, &mut some).is_err());
        let copy = dir.path().join("copy.img");
        disks[0].copy_to(&fs::File::create(&copy).unwrap(), &copy).unwrap();
        assert_eq!(fs::read(&copy).unwrap(), disk.bytes);
        verify(&at).unwrap();
        assert_eq!(names(dir.path()), ["copy.img", "one"], "nothing is left aside");
    }
}
