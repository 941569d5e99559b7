//! Directories exchanged while a snapshot is opened: the opened files are the checked ones.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clade_memory::Store;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::faults::Plan;
use super::support::*;
use crate::files::{FileOp, FileOps};
use crate::{DiskToSave, Error, Load, ParentDirs, Snapshot};

/// A full snapshot and one on top of it, all pages of both made of `byte`; returns the newer one's
/// memory. With equal bytes everything is equal but the identities.
fn pair(store: &Store, dir: &Path, byte: u8) -> Vec<u8> {
    let ram = born(&layout(), store);
    (0..100).for_each(|page| put(&ram, page, byte));
    let mut disk = ModelDisk::new(4 * 4096);
    disk.write(0, &[byte; 2 * 4096]);
    let disks = [DiskToSave { name: "root", space: &disk }];
    let (one, two) = (dir.join("one"), dir.join("two"));
    let first = freeze(&ram);
    let id = Saving { disks: &disks, ..Saving::default() }.save(&first, &one).unwrap().id;
    (50..120).for_each(|page| put(&ram, page, byte + 1));
    let disks = [DiskToSave { name: "root", space: &disk }];
    let base = Some((one.as_path(), id, &first));
    Saving { disks: &disks, base, ..Saving::default() }.save(&freeze(&ram), &two).unwrap();
    contents(&ram)
}

fn exchange(a: &Path, b: &Path) {
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
}

/// The contents of a snapshot: memory and the disk.
fn all(snapshot: &Snapshot, store: &Store) -> Result<(Vec<u8>, Vec<u8>), Error> {
    let memory = contents(&child(&snapshot.restore_ram(store, &Load::Lazy)?, store));
    let mut disk = vec![0; 4 * 4096];
    snapshot.disks()[0].read_at(0, &mut disk)?;
    Ok((memory, disk))
}

#[test]
fn a_directory_exchanged_between_check_and_open_is_not_followed() {
    let store = Store::open_small().unwrap();
    let dir = scratch();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    [&ours, &theirs].into_iter().for_each(|path| std::fs::create_dir(path).unwrap());
    pair(&store, &ours, 10);
    pair(&store, &theirs, 77);
    let open = |files: &FileOps| {
        Snapshot::with(files, &ours.join("two"), &ParentDirs::siblings()).and_then(|found| all(&found, &store))
    };
    let plan = Arc::new(Plan::default());
    let wanted = open(&FileOps { plan: Some(plan.clone()) }).unwrap();
    let opens = plan.trace().into_iter().filter(|(op, _)| *op == FileOp::Open).count() as u64;
    // Two directories, and in each a manifest, a state, and two files of memory and of the disk.
    assert!(opens >= 14, "{opens}");
    for (what, at) in [("both", ""), ("the newer", "two"), ("the older", "one")] {
        let (mut old, mut failed) = (0, 0);
        for step in 0..opens {
            let count = AtomicU64::new(0);
            let (a, b) = (ours.join(at), theirs.join(at));
            let plan = Plan::hooked(move |op, _| {
                if op == FileOp::Open && count.fetch_add(1, Ordering::SeqCst) == step {
                    exchange(&a, &b);
                }
                Ok(())
            });
            let found = open(&FileOps { plan: Some(Arc::new(plan)) });
            exchange(&ours.join(at), &theirs.join(at));
            match found {
                // Before the first file is opened, the other pair is in place.
                Ok(found) if step == 0 && at.is_empty() => assert!(found != wanted),
                Ok(found) => {
                    assert!(found == wanted, "{what} exchanged at step {step}: neither the one nor the other");
                    old += 1;
                }
                // The parent is another snapshot, which is detected.
                Err(Error::Parent { .. }) => failed += 1,
                Err(error) => panic!("{what} exchanged at step {step}: {error:?}"),
            }
        }
        // Both together: the parent is the one beside the child that was opened.
        let most = if at.is_empty() { 0 } else { 4 };
        assert!(old >= opens - 4 && failed <= most, "{what}: {old} {failed} of {opens}");
    }
}
