//! Helpers for tests of disks.

use std::sync::Arc;
use std::time::Duration;

use clade_host_io::{AlignedBuf, Fragment};
use clade_test_support::wait_until;
use proptest::prelude::*;

use super::{Disk, DiskImage, DiskOp};

/// The time of one look. A loop looks again afterwards.
pub(super) const SOON: Duration = Duration::from_secs(10);

/// Memory filled with `bytes`. Operations in the kernel keep it alive.
pub(super) fn buffer(bytes: &[u8]) -> Vec<Fragment> {
    let buffer = Arc::new(AlignedBuf::new(bytes.len()));
    let fragment = Fragment::owned(&buffer, 0, bytes.len()).unwrap();
    fragment.slice().copy_from(bytes);
    vec![fragment]
}

/// Submits a write.
pub(super) fn begin_write(disk: &mut Disk, offset: u64, bytes: &[u8], token: u64) {
    disk.submit(DiskOp::Write { offset, buffers: buffer(bytes) }, token).unwrap();
    disk.kick().unwrap();
}

pub(super) fn write(disk: &mut Disk, offset: u64, bytes: &[u8]) {
    begin_write(disk, offset, bytes, 1);
    finish(disk);
}

pub(super) fn read(disk: &mut Disk, offset: u64, len: usize) -> Vec<u8> {
    let (buffers, mut bytes) = (buffer(&vec![0xee; len]), vec![0; len]);
    disk.submit(DiskOp::Read { offset, buffers: buffers.clone() }, 1).unwrap();
    finish(disk);
    buffers[0].slice().copy_to(&mut bytes);
    bytes
}

/// Waits until all operations in flight have ended, and returns the number of completed requests.
pub(super) fn finish(disk: &mut Disk) -> usize {
    let mut ended = 0;
    disk.kick().unwrap();
    loop {
        for done in disk.take_done().into_iter().chain(disk.reap().unwrap()) {
            done.result.unwrap();
            ended += 1;
        }
        if disk.in_flight() == 0 {
            return ended;
        }
        disk.wait(SOON).unwrap();
    }
}

/// Waits for the parent's writes in flight to an image.
pub(super) fn settle(image: &DiskImage) {
    wait_until("the writes to an image end", || image.settle(Duration::from_millis(100)));
}

/// All of an image.
pub(super) fn whole(image: &DiskImage) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(0, &mut bytes).unwrap();
    bytes
}

/// The start and the length of a run of at most `most` of `all`.
pub(super) fn run(all: u64, most: u64) -> impl Strategy<Value = (u64, u64)> + Clone {
    (0..all).prop_flat_map(move |first| (Just(first), 1..=(all - first).min(most)))
}
