//! The speed of saving and restoring memory here, beside that of the disk: `speed DIRECTORY [MIB]`.

use std::error::Error;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use clade_memory::{GuestRam, Quiesced, RamLayout, Store};
use clade_snapshot::{Compression, Load, ParentDirs, Save, SaveProgress, Snapshot, verify};
use rustix::fs::OFlags;
use vm_memory::{Bytes, GuestAddress};

/// Writes past the page cache in 4 MiB, as `dd oflag=direct` does.
fn direct(path: &Path, mib: u64) -> Result<f64, Box<dyn Error>> {
    let mut options = OpenOptions::new();
    let file =
        options.write(true).create(true).truncate(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path)?;
    let raw = vec![0x5au8; (4 << 20) + 4096];
    let skip = raw.as_ptr().align_offset(4096);
    let start = Instant::now();
    for at in 0..mib / 4 {
        file.write_all_at(&raw[skip..skip + (4 << 20)], at << 22)?;
    }
    file.sync_all()?;
    let took = start.elapsed().as_secs_f64();
    std::fs::remove_file(path)?;
    Ok(mib as f64 / took)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("a directory on the disk to measure is needed")?;
    let mib: u64 = args.next().map_or(Ok(1024), |mib| mib.parse())?;
    let store = Store::open()?;
    let layout = RamLayout::new(mib << 20)?;
    let ram = GuestRam::reserve(&layout, &store)?;
    ram.populate()?;
    let mut state = 1u64;
    let mut bytes = vec![0; 1 << 20];
    for at in 0..mib {
        // Half of it can be compressed.
        for word in bytes[..1 << 19].chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        bytes[1 << 19..].fill(at as u8 | 1);
        ram.memory().write_slice(&bytes, GuestAddress(at << 20))?;
    }
    let (image, _) = ram.freeze(&Quiesced::by(&clade_memory::NoWriters))?;
    let at = Path::new(&dir).join("speed");
    for compression in [Compression::None, Compression::None, Compression::Zstd] {
        let disk = direct(&Path::new(&dir).join("speed.direct"), mib)?;
        let start = Instant::now();
        let save = Save { memory: &image, disks: &[], sections: &[], base: None, compression, replace: false };
        let saved = save.to(&at, &SaveProgress::none())?;
        let rate = mib as f64 / start.elapsed().as_secs_f64();
        println!(
            "save {compression:?}: {rate:.0} MiB/s into {} MiB; direct writes {disk:.0} MiB/s; ratio {:.2}",
            saved.data_bytes >> 20,
            rate / disk
        );
        let start = Instant::now();
        let opened = Snapshot::open(&at, &ParentDirs::siblings())?;
        let open = start.elapsed();
        for load in [Load::Lazy, Load::Preload] {
            let start = Instant::now();
            let image = opened.restore_ram(&store, &load)?;
            let child = GuestRam::reserve(&layout, &store)?;
            child.adopt(&image)?;
            println!("restore {load:?}: {:.2?} after {open:.2?} to open", start.elapsed());
        }
        let start = Instant::now();
        verify(&at, &ParentDirs::siblings())?;
        println!("verify: {:.0} MiB/s", mib as f64 / start.elapsed().as_secs_f64());
    }
    std::fs::remove_dir_all(at)?;
    Ok(())
}
