//! Memory over a file that is truncated: one VM is notified of its loss, and the process survives.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::mpsc;

use clade_memory::{
    FillError, GuestRam, ImageMap, LayerSource, PAGE_SIZE, PageRange, Quiesced, RamImage, RamLayout, Store,
};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::{Bytes, GuestAddress};

const PAGES: u64 = 64;

fn file(byte: u8) -> File {
    let mut file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::io::Write::write_all(&mut file, &vec![byte; (PAGES * PAGE_SIZE) as usize]).unwrap();
    file
}

fn over(file: &File, store: &Store) -> GuestRam {
    let layout = RamLayout::new(PAGES * PAGE_SIZE).unwrap();
    let layer = store.file_layer(file.try_clone().unwrap(), PAGES).unwrap();
    let mut map = ImageMap::new();
    map.insert(PageRange::new(0, PAGES), LayerSource { layer, at: 0 });
    let image = RamImage::from_parts(store, &layout, vec![(map, Vec::new())]).unwrap();
    let ram = GuestRam::reserve(&layout, store).unwrap();
    ram.adopt(&image).unwrap();
    ram
}

fn byte(ram: &GuestRam, page: u64) -> u8 {
    ram.memory().read_obj(GuestAddress(page * PAGE_SIZE + 7)).unwrap()
}

#[test]
fn a_vm_whose_file_is_cut_short_is_told_and_no_other() {
    let store = Store::open_small().unwrap();
    let (first, second) = (file(1), file(2));
    let (lost, well) = (over(&first, &store), over(&second, &store));
    let (told, hear) = mpsc::channel();
    lost.on_failure(move |error| told.send(matches!(**error, FillError::Gone)).unwrap());
    assert_eq!((byte(&lost, 0), byte(&well, 0)), (1, 2));
    lost.memory().write_obj(9u8, GuestAddress(3 * PAGE_SIZE + 7)).unwrap();
    first.set_len(0).unwrap();
    // The value read now is meaningless, but the read succeeds.
    let _ = byte(&lost, 30);
    assert!(clade_test_support::receive("the callback", &hear), "it is told why");
    assert!(matches!(lost.failure().as_deref(), Some(FillError::Gone)));
    // The kernel drops a VM's own copies of a file's pages with the file's, so all of it is lost.
    let _ = byte(&lost, 3);
    assert!(well.failure().is_none());
    (0..PAGES).for_each(|page| assert_eq!(byte(&well, page), 2));
    // A freeze must not turn it into memory for other VMs, and the attempt must be harmless.
    drop(lost.freeze(&Quiesced::by(&clade_memory::NoWriters)));
    drop(lost);
    assert_eq!(byte(&over(&second, &store), 5), 2);
}

#[test]
#[ignore = "ends the process; run by the test below"]
fn touches_what_is_nobodys() {
    let store = Store::open_small().unwrap();
    let _watched = over(&file(1), &store);
    let other = file(3);
    let flags = MapFlags::PRIVATE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let at = unsafe { mmap(std::ptr::null_mut(), 4096, ProtFlags::READ, flags, &other, 0) }.unwrap();
    other.set_len(0).unwrap();
    // SAFETY: the address is mapped; the SIGBUS on access is the subject of the test.
    let byte = unsafe { at.cast::<u8>().read_volatile() };
    println!("read {byte}");
}

#[test]
fn other_accesses_end_the_process_as_ever() {
    let exe = std::env::current_exe().unwrap();
    let output = Command::new(exe).args(["--exact", "touches_what_is_nobodys", "--ignored"]).output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
}
