//! Everything of an image but its memory, serialized and read back: the resulting VM goes on.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use clade_block::{CLUSTER, DiskImage, DiskLayer};
use clade_devices::virtio::Backend;
use clade_guests::abi::disk::What;
use clade_host_io::{CachePolicy, IoFile};
use clade_memory::Backing;
use clade_test_support::wait_until;
use clade_tests::{DiskFile, DiskGuest, Guest, Turn, Writer, saved_vcpus, until_in_flight, with_vcpus};
use clade_vmm::vm::{ForkImage, sections};

const BYTES: u64 = 4 << 20;
const SECTORS: u64 = BYTES / 512;

fn read_back(image: &ForkImage, disk: DiskImage) -> Arc<ForkImage> {
    let sections = image.sections().unwrap();
    let named = || sections.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
    assert_eq!(sections::config(named()).unwrap(), **image.config());
    assert_eq!(sections::host_requirements(named()).unwrap(), image.host_requirements());
    Arc::new(ForkImage::from_sections(named(), image.ram().clone(), vec![Backend::Disk(disk)]).unwrap())
}

/// Writes the disk of `image` to a file at `path`, and makes it from that again.
fn written_down(image: &ForkImage, path: &std::path::Path) -> DiskImage {
    let disk = image.disks().next().unwrap();
    wait_until("the disk settles", || disk.settle(Duration::from_millis(50)));
    let runs = disk.runs().unwrap();
    let to = File::create_new(path).unwrap();
    for run in runs.iter().filter(|run| !run.zero) {
        let mut bytes = vec![0; ((run.clusters.end - run.clusters.start) * CLUSTER) as usize];
        disk.read_at(run.clusters.start * CLUSTER, &mut bytes).unwrap();
        to.write_all_at(&bytes, run.clusters.start * CLUSTER).unwrap();
    }
    drop(to);
    let file = Arc::new(IoFile::open(path, false, CachePolicy::Host).unwrap());
    DiskImage::from_layers(disk.config(), disk.size(), &[DiskLayer { file: Some(file), runs }]).unwrap()
}

/// A guest that was booted on another host, whose processor has another name, goes on with that
/// name.
#[test]
fn a_guest_keeps_the_cpuid_it_was_booted_with() {
    const NAME: u32 = 0x8000_0002;
    const ELBR: u32 = u32::from_le_bytes(*b"Elbr");
    let Some(turn) = Turn::take() else { return };
    let context = turn.context(Backing::Huge);
    let guest = Guest::boot(&context, 48, 2);
    guest.fill(Writer::Guest, 0, 64, 1);
    let (image, _) = guest.fork();
    let foreign = with_vcpus(&image, |state| {
        state.cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == NAME).for_each(|entry| entry.eax = ELBR);
    });
    let child = Guest::child(&context, &foreign);
    child.expect(0, 64, Some(1), "it runs");
    let kept = saved_vcpus(&child.fork().0);
    for (state, want) in kept.iter().zip(&saved_vcpus(&foreign)) {
        assert_eq!(state.cpuid.as_slice(), want.cpuid.as_slice());
        assert!(state.cpuid.as_slice().iter().any(|entry| entry.function == NAME && entry.eax == ELBR));
    }
    child.vm().reset(&foreign).unwrap();
    child.expect(0, 64, Some(1), "and is put back, though a vCPU that has run takes no other CPUID");
}

#[test]
fn a_vm_written_down_in_the_middle_of_its_writes_goes_on() {
    until_in_flight(|| {
        let Some(turn) = Turn::take() else { return };
        let context = turn.context(Backing::Huge);
        let file = DiskFile::new(BYTES, 1);
        let mut spec = file.spec();
        spec.disk.latency = Some(Duration::from_millis(20));
        let parent = DiskGuest::boot(&context, spec, 2);
        let run = DiskGuest::whole(What::Write, SECTORS, 2);
        let seq = parent.begin(run);
        let image = parent.fork_in_flight(run.count / 3);
        image.host_requirements().check(context.host()).unwrap();
        let again = read_back(&image, written_down(&image, &file.beside("layer")));
        assert_eq!(parent.finish(seq), (run.count, 0, 0));
        drop((parent, image));

        let child = DiskGuest::paused_child(&context, &again, "restored");
        assert_eq!(child.finish(seq), (run.count, 0, 0), "each done once, none wrong");
        child.expect(DiskGuest::whole(What::Verify, SECTORS, 2), "what was written around the snapshot");
        // And again, from its current state.
        child.expect(DiskGuest::whole(What::Write, 800, 3), "it writes");
        let (image, _) = child.guest.fork();
        let second = read_back(&image, written_down(&image, &file.beside("second")));
        let grandchild = DiskGuest::paused_child(&context, &second, "again");
        grandchild.expect(DiskGuest::whole(What::Verify, 800, 3), "the disk it had");
        child.expect(DiskGuest::whole(What::Verify, 800, 3), "its own");
    });
}
