//! Makes the snapshots that later versions must read. Run once for each new version of the format.

use std::fs;
use std::io;
use std::path::Path;

use clade_memory::{PageRange, RamLayout, Store};
use vm_memory::GuestAddress;

use super::support::*;
use crate::ParentDirs;
use crate::content::PageContent;
use crate::format::Manifest;
use crate::space::Space;
use crate::*;

/// 5,000 bytes, of which one in each page is set; or only the second page.
struct Disk(PageRange);

impl Space for Disk {
    fn bytes(&self) -> u64 {
        5000
    }
    fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>> {
        Ok(vec![(self.0, PageContent::Data)])
    }
    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        for (at, byte) in [(10u64, 0x44), (4999, 0x55)] {
            let here = at.checked_sub(page * 4096).and_then(|at| bytes.get_mut(at as usize));
            here.into_iter().for_each(|here| *here = byte);
        }
        Ok(())
    }
}

/// Replaces random values by fixed ones.
fn fix(dir: &Path, id: u128, parent: Option<u128>) {
    let path = dir.join("manifest.json");
    let mut manifest = Manifest::decode(&fs::read(&path).unwrap()).unwrap();
    (manifest.id, manifest.created) = (SnapshotId::new(id), 1_700_000_000);
    if let (Some(parent), Some(id)) = (&mut manifest.parent, parent) {
        parent.id = SnapshotId::new(id);
    }
    fs::write(&path, manifest.encode()).unwrap();
}

#[test]
#[ignore = "writes what the test of fixtures reads"]
fn make_fixtures() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/v{}", format::VERSION.major));
    fs::create_dir_all(&dir).unwrap();
    let sections: &[(&str, &[u8])] = &[("config", b"{\"cpus\":1}"), ("vcpus", &[0, 255]), ("empty", b"")];
    let store = Store::open_small().unwrap();
    let layout = RamLayout::of_ranges(&[(GuestAddress(0x1000), 2), (GuestAddress(0x10_0000), 18)]).unwrap();
    let ram = born(&layout, &store);
    put(&ram, 0, 0x11);
    put(&ram, 19, 0x22);
    let first = freeze(&ram);
    let (full, child) = (dir.join("full"), dir.join("child"));
    let disk = Disk(PageRange::new(0, 2));
    let disks = [DiskToSave { name: "root", space: &disk }];
    let save =
        Save { memory: &first, disks: &disks, sections, base: None, compression: Compression::None, replace: true };
    save.to(&full, &SaveProgress::none()).unwrap();
    fix(&full, 0xa1a1, None);
    put(&ram, 1, 0x33);
    put(&ram, 19, 0);
    let disk = Disk(PageRange::new(1, 2));
    let disks = [DiskToSave { name: "root", space: &disk }];
    let base = Some(Base { dir: &full, id: SnapshotId::new(0xa1a1), image: &first, is_fixed: false });
    let second = freeze(&ram);
    let save = Save { memory: &second, disks: &disks, sections, base, compression: Compression::Zstd, replace: true };
    save.to(&child, &SaveProgress::none()).unwrap();
    fix(&child, 0xb1b1, Some(0xa1a1));
    record(&child, &[PageRange::new(19, 20), PageRange::new(0, 2)]).unwrap();
    assert_eq!(verify(&child, &ParentDirs::siblings()).unwrap().snapshots, 2);
}
