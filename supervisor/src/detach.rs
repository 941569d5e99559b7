//! Detached checkpoints: no VM's process can write the files that their children start from.
//!
//! A VM's process has descriptors for writing its layers and overlays. A checkpoint that is taken before
//! a guest breaks out would change with them afterwards. So a worker without a guest copies them
//! ([`clade_worker::DetachRequest`]), and ends.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use clade_block::DiskConfig;
use rustix::time::{ClockId, clock_gettime};

use super::checkpoint::Checkpoint;
use super::copied_files::CopiedPart;
use super::vm_record::VmRecord;
use super::{ImagePermit, Supervisor};
use clade_api::http::Cancel;
use clade_api::{DaemonError, DetachedInfo, ProblemKind};
use clade_vmm::vm::{FileId, ImageFile, SealedParts, file_id_at};
use clade_worker::jail::{Grants, is_block_device};
use clade_worker::{DetachRequest, DetachedParts, KnownFiles, KnownPart, VmTemplate, packed};

/// Refuses the image of a worker that was broken into by the image that it got. Each file is one of
/// `allowed`, or was made by the worker: born since `start`, and in no image before.
fn expect_copied(
    before: &[ImageFile<'_>],
    allowed: &[FileId],
    start: (i64, u32),
    after: &[ImageFile<'_>],
) -> Result<(), DaemonError> {
    let before: HashSet<FileId> = before.iter().map(|file| file.id).collect();
    let is_new = |file: &ImageFile<'_>| {
        let (.., seconds, nanoseconds) = file.id;
        // Some file systems have no birth times, and some have seconds alone.
        let least = if nanoseconds == 0 { (start.0, 0) } else { start };
        let born = (seconds, nanoseconds) == (0, 0) || (seconds, nanoseconds) >= least;
        file.has_no_writer && born && !before.contains(&file.id)
    };
    if after.iter().all(|file| allowed.contains(&file.id) || is_new(file)) {
        return Ok(());
    }
    let source = io::Error::other("the copy of a checkpoint has a file that another process may write");
    Err(DaemonError::Worker { source })
}

/// The clock of files' birth times.
fn now() -> (i64, u32) {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    (now.tv_sec, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// The files of VMs of `template` that none of their processes can write: those of their snapshots, and
/// images that are only read.
fn safe_files(template: &VmTemplate) -> Vec<FileId> {
    let images = template.config.disks.iter().map(|disk| &disk.disk).filter(|_| template.saved.is_empty());
    let images = images.filter(|disk| !template.writes_in_place(disk)).filter_map(image_id);
    let of_snapshots = template.saved.iter().filter_map(|dir| std::fs::read_dir(&dir.path).ok());
    let of_snapshots = of_snapshots.flat_map(|entries| entries.flatten().map(|entry| entry.path()));
    images.chain(of_snapshots.filter_map(|path| file_id_at(&path).ok())).collect()
}

/// The file at a disk's path, which may be a symbolic link.
fn image_id(disk: &DiskConfig) -> Option<FileId> {
    file_id_at(&disk.path.canonicalize().ok()?).ok()
}

/// Refuses a VM whose checkpoints cannot be detached.
///
/// # Errors
/// When a VM writes a block device.
fn expect_detachable(template: &VmTemplate) -> Result<(), DaemonError> {
    let mut disks = template.config.disks.iter().map(|disk| &disk.disk);
    let device = disks.find(|disk| template.writes_in_place(disk) && is_block_device(&disk.path));
    device.map_or(Ok(()), |disk| {
        let text = format!(
            "a checkpoint of this VM cannot be detached: it writes the block device {}, which is not copied; run it with \
             `ephemeral` or `ro`",
            disk.path.display()
        );
        Err(DaemonError::Refused { kind: ProblemKind::WrongState, text })
    })
}

impl Supervisor {
    /// Forks the VM called `vm`, which runs on, and returns the image with copies of the files that its
    /// process can write.
    ///
    /// # Errors
    /// When there is no such VM, it cannot be forked or detached, or the host lacks room for copies.
    pub(super) fn detached_image(
        &self,
        vm: &str,
        permit: ImagePermit,
        cancel: &Cancel,
    ) -> Result<Checkpoint, DaemonError> {
        expect_detachable(&VmRecord::expect(&self.0.dir, vm)?.template)?;
        let taken = self.take_checkpoint(vm, cancel)?;
        drop(permit);
        self.detach(taken, cancel)
    }

    /// Returns the checkpoint with copies of the files that a VM's process can write.
    ///
    /// # Errors
    /// When the host lacks memory or room for copies; when the request is cancelled.
    fn detach(&self, checkpoint: Checkpoint, cancel: &Cancel) -> Result<Checkpoint, DaemonError> {
        let begun = Instant::now();
        let template = &checkpoint.vm_record().template;
        let VmTemplate { config, overlays, .. } = template;
        let _overlays = self.0.overlays.hold(&template.written())?;
        let worker = self.0.zygote.workers(1)?.pop().ok_or(DaemonError::Ending)?;
        let grants = Grants { overlays: template.written(), ..Grants::default() };
        worker.confine(self.0.sandbox.confine_request(config, 0, grants))?;
        let vm = checkpoint.vm_record().process;
        // Also: nothing but files and pipes goes to the worker, so no descriptor leaves it but for here.
        let before = checkpoint.parts().image_files()?;
        let (mut safe, known) = self.0.copied_files.among(vm, &before);
        safe.extend(safe_files(template));
        expect_images(template, &before)?;
        let request = DetachRequest { config: config.clone(), overlays: overlays.clone() };
        let message = known_message(safe.clone(), &known)?;
        let start = now();
        let DetachedParts { counts, image, made } =
            worker.detach(request, &message, checkpoint.parts(), || self.check(0, 0, cancel))?;
        let after = image.image_files()?;
        safe.extend(known.iter().map(|part| part.id));
        expect_copied(&before, &safe, start, &after)?;
        let failed = |source| DaemonError::Worker { source };
        let copies = self.0.copied_files.add(vm, &after, made, known).map_err(failed)?;
        let info = DetachedInfo { total_us: begun.elapsed().as_secs_f64() * 1e6, ..counts };
        drop((before, after));
        Ok(checkpoint.with_parts(image, info, copies, &self.0.images_in_use))
    }
}

/// Refuses a VM whose read-only disk has been replaced by another file: there is no directory for a copy.
fn expect_images(template: &VmTemplate, files: &[ImageFile<'_>]) -> Result<(), DaemonError> {
    let mut disks = template.config.disks.iter().map(|disk| &disk.disk).filter(|_| template.saved.is_empty());
    let is_there = |disk: &DiskConfig| image_id(disk).is_some_and(|id| files.iter().any(|file| file.id == id));
    disks.find(|disk| disk.read_only && !is_there(disk)).map_or(Ok(()), |disk| {
        let path = disk.path.display();
        let text = format!("a checkpoint of this VM cannot be detached: {path} was replaced since the VM was booted");
        Err(DaemonError::Refused { kind: ProblemKind::WrongState, text })
    })
}

/// The message to the worker with the files and parts that are not copied again.
fn known_message(safe: Vec<FileId>, known: &[Arc<CopiedPart>]) -> Result<SealedParts, DaemonError> {
    let (mut parts, mut files) = (Vec::new(), Vec::new());
    for (descriptor, part) in known.iter().enumerate() {
        files.push(part.copy.try_clone().map_err(|source| DaemonError::Worker { source })?);
        parts.push(KnownPart { of: part.of, runs: part.runs.clone(), descriptor });
    }
    packed(&KnownFiles { safe, parts }, files)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::path::Path;

    use super::*;
    use crate::copied_files::CopiedFiles;
    use crate::processes::ProcessId;
    use crate::vm_record::template_of_boot;
    use clade_block::DiskConfig;
    use clade_devices::virtio::block::BlockOptions;
    use clade_snapshot::KnownDir;
    use clade_vmm::vm::{CopiedFile, DiskSpec, VmConfig};

    fn template(disks: &[DiskConfig]) -> VmTemplate {
        let mut config = VmConfig::new(32 << 20, 1).unwrap();
        let spec = |disk: &DiskConfig| DiskSpec { disk: disk.clone(), device: BlockOptions::default() };
        config.disks = disks.iter().map(spec).collect();
        template_of_boot(&config)
    }

    #[test]
    fn files_that_are_safe_are_images_that_are_read_and_a_snapshots() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str| {
            std::fs::write(dir.path().join(name), name).unwrap();
            DiskConfig::new(&dir.path().join(name))
        };
        let read = DiskConfig { read_only: true, ..disk("read") };
        let ephemeral = DiskConfig { ephemeral: true, ..disk("ephemeral") };
        std::os::unix::fs::symlink("read", dir.path().join("link")).unwrap();
        let linked = DiskConfig { path: dir.path().join("link"), ..read.clone() };
        let booted = template(&[disk("written"), read.clone(), ephemeral, linked]);
        let id = |name: &str| file_id_at(&dir.path().join(name)).unwrap();
        assert_eq!(safe_files(&booted), [id("read"), id("ephemeral"), id("read")]);
        expect_detachable(&booted).unwrap();
        // A boot with one of these images waits only for VMs and checkpoints that have it open.
        let images = |template: &VmTemplate| -> Vec<_> {
            template.images().map(|image| image.file_name().unwrap().to_owned()).collect()
        };
        assert_eq!(images(&booted), ["written", "read", "ephemeral", "link"]);
        let detached = VmTemplate { detached: true, ..booted.clone() };
        assert_eq!(images(&detached), ["read", "ephemeral", "link"]);
        // A restored VM: the paths of its disks are the snapshot's, and not believed.
        let saved = tempfile::tempdir().unwrap();
        std::fs::write(saved.path().join("memory.data"), "x").unwrap();
        let known = KnownDir { path: saved.path().to_owned(), id: None };
        let restored = VmTemplate { saved: vec![known], ..booted.clone() };
        assert!(images(&restored).is_empty());
        assert_eq!(safe_files(&restored), [file_id_at(&saved.path().join("memory.data")).unwrap()]);
        // An image that is only read, and was replaced.
        let only = template(&[read]);
        let file = std::fs::File::open("/dev/null").unwrap();
        let files = [ImageFile { id: id("read"), file: file.as_fd(), has_no_writer: false }];
        expect_images(&only, &files).unwrap();
        std::fs::rename(dir.path().join("written"), dir.path().join("read")).unwrap();
        let refused = expect_images(&only, &files).unwrap_err();
        assert!(
            refused.problem() == ProblemKind::WrongState && refused.to_string().contains("was replaced"),
            "{refused}"
        );
    }

    #[test]
    fn a_block_device_that_is_written_is_not_copied() {
        let devices = ["/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0", "/dev/ram0"].map(Path::new);
        let Some(device) = devices.into_iter().find(|path| is_block_device(path)) else {
            return clade_test_support::skipped("there is no block device");
        };
        let disk = DiskConfig::new(device);
        let refused = expect_detachable(&template(std::slice::from_ref(&disk))).unwrap_err();
        assert_eq!(refused.problem(), ProblemKind::WrongState);
        assert!(refused.to_string().contains(device.to_str().unwrap()), "{refused}");
        expect_detachable(&template(&[DiskConfig { read_only: true, ..disk }])).unwrap();
    }

    fn list<'a>(ids: &[FileId], file: &'a std::fs::File) -> Vec<ImageFile<'a>> {
        ids.iter().map(|id| ImageFile { id: *id, file: file.as_fd(), has_no_writer: true }).collect()
    }

    const fn id(inode: u64) -> FileId {
        (0, 1, inode, 500, 6)
    }

    #[test]
    fn copies_are_known_as_long_as_a_checkpoint_holds_them() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let ids = |inodes: &[u64]| list(&inodes.iter().map(|inode| id(*inode)).collect::<Vec<_>>(), &file);
        let files = CopiedFiles::default();
        let among = |inodes: &[u64]| files.among(None, &ids(inodes)).0;
        let add = |inodes: &[u64]| files.add(None, &ids(inodes), Vec::new(), Vec::new()).unwrap();
        assert!(among(&[1]).is_empty());
        let first = add(&[1, 2]);
        let second = add(&[2, 3]);
        assert_eq!(among(&[4, 3, 1]), [id(3), id(1)]);
        drop(first);
        assert_eq!(among(&[1, 2, 3]), [id(2), id(3)]);
        // The same inode number, born later.
        assert!(files.among(None, &list(&[(0, 1, 2, 500, 7)], &file)).0.is_empty());
        drop(second);
        assert!(among(&[2, 3]).is_empty() && files.is_empty());
        // Copies have no names.
        let named = [ImageFile { has_no_writer: false, ..ids(&[5])[0] }];
        let _held = files.add(None, &named, Vec::new(), Vec::new()).unwrap();
        assert!(among(&[5]).is_empty());
    }

    #[test]
    fn parts_are_known_for_the_process_that_gave_them_while_a_checkpoint_has_them() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let (one, other) = (ProcessId::of(std::process::id()), ProcessId::of(1));
        assert!(one.is_some() && one != other);
        let files = CopiedFiles::default();
        let after = list(&[id(7), id(8)], &file);
        let made = |copy, runs: &[(u64, u64)]| {
            let runs = runs.iter().map(|(start, end)| *start..*end).collect();
            CopiedFile { of: id(1), runs, copy: id(copy) }
        };
        let wrong = [made(9, &[(0, 1)]), made(8, &[(3, 3)]), made(8, &[(4, 6), (5, 7)]), made(8, &[(6, 5)])];
        let all = [vec![made(7, &[(0, 2), (2, 5)])], wrong.to_vec()].concat();
        let first = files.add(one, &after, all, Vec::new()).unwrap();
        let shown = list(&[id(1)], &file);
        let known = |vm: Option<ProcessId>| files.among(vm, &shown).1;
        assert_eq!(known(one).iter().map(|part| part.runs.clone()).collect::<Vec<_>>(), [[0..2, 2..5]]);
        assert!(known(other).is_empty() && known(None).is_empty());
        assert!(files.among(one, &after).1.is_empty(), "the image does not show the file");
        // A second checkpoint has it too, and keeps it.
        let second = files.add(one, &after, vec![made(8, &[(9, 10)])], known(one)).unwrap();
        assert_eq!(known(one).len(), 2);
        drop(first);
        assert_eq!(known(one).len(), 2);
        let message = known_message(vec![id(7)], &known(one)).unwrap();
        assert_eq!(message.descriptors(), 3);
        // The third shows nothing of the first copy, and does not keep it.
        let third = files.add(one, &after[1..], Vec::new(), known(one)).unwrap();
        drop(second);
        assert_eq!(known(one).iter().map(|part| part.id).collect::<Vec<_>>(), [id(8)]);
        drop(third);
        assert!(known(one).is_empty());
    }

    #[test]
    fn an_image_that_comes_back_with_files_of_others_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let before = list(&[id(1), id(2), id(3)], &file);
        let start = (500, 6);
        let expect = |after: &[ImageFile<'_>]| expect_copied(&before, &[id(3)], start, after);
        // One that stays, and copies.
        expect(&list(&[id(3), id(4), (0, 1, 5, 501, 1), (0, 1, 6, 0, 0), (0, 1, 7, 500, 0)], &file)).unwrap();
        let uncopied = list(&[id(4), id(2)], &file);
        let older = list(&[(0, 1, 8, 500, 5)], &file);
        let older_by_a_second = list(&[(0, 1, 8, 499, 0)], &file);
        let named = vec![ImageFile { has_no_writer: false, ..list(&[id(9)], &file)[0] }];
        for wrong in [uncopied, older, older_by_a_second, named] {
            let refused = expect(&wrong).unwrap_err();
            assert!(clade_vmm::error_chain(&refused).contains("may write"), "{refused:?}");
        }
        // The birth time of a file is not before the time read before its creation.
        let before_it = now();
        let made = tempfile::tempfile().unwrap();
        let parts = clade_vmm::vm::ImageParts::from_raw(
            Vec::new(),
            vec![
                std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&made)))
                    .unwrap()
                    .into(),
            ],
        );
        let parts = parts.seal().unwrap();
        let (.., seconds, nanoseconds) = parts.image_files().unwrap()[0].id;
        assert!((seconds, nanoseconds) == (0, 0) || (seconds, nanoseconds) >= before_it);
    }
}
