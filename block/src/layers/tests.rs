use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clade_host_io::CachePolicy;
use proptest::prelude::*;

use super::*;
use crate::steps_trace::testing::traced;
use crate::testutil::{buffer, finish, read, run, settle, whole, write};
use crate::{CommitError, Disk, DiskOp};

/// The last cluster is short.
const SIZE: u64 = 40 * CLUSTER + 3 * SECTOR;

/// A disk's file in `dir`: data, with a hole from cluster 20 to 30.
fn file(dir: &Path) -> (PathBuf, Vec<u8>) {
    let path = dir.join("disk.img");
    let mut model: Vec<u8> = (0..SIZE).map(|at| (at / SECTOR) as u8 | 1).collect();
    model[20 * CLUSTER as usize..30 * CLUSTER as usize].fill(0);
    let to = File::create(&path).unwrap();
    to.set_len(SIZE).unwrap();
    to.write_all_at(&model[..20 * CLUSTER as usize], 0).unwrap();
    to.write_all_at(&model[30 * CLUSTER as usize..], 30 * CLUSTER).unwrap();
    (path, model)
}

fn bytes_of(run: &DiskRun, size: u64) -> Range<usize> {
    (run.clusters.start * CLUSTER) as usize..((run.clusters.end * CLUSTER).min(size)) as usize
}

/// Writes `runs` of `image` to a file, as a snapshot does.
fn layer(dir: &Path, number: usize, image: &DiskImage, runs: Vec<DiskRun>) -> DiskLayer {
    let path = dir.join(format!("layer{number}"));
    let to = File::create(&path).unwrap();
    to.set_len(image.size()).unwrap();
    for run in runs.iter().filter(|run| !run.zero) {
        let range = bytes_of(run, image.size());
        let mut bytes = vec![0; range.len()];
        image.read_at(range.start as u64, &mut bytes).unwrap();
        to.write_all_at(&bytes, range.start as u64).unwrap();
    }
    drop(to);
    let file = Arc::new(IoFile::open(&path, false, CachePolicy::Host).unwrap());
    DiskLayer { file: Some(file), runs }
}

fn covers(runs: &[DiskRun], cluster: u64) -> bool {
    runs.iter().any(|run| run.clusters.contains(&cluster))
}

#[derive(Clone, Debug)]
enum Act {
    Write {
        sector: u64,
        sectors: u64,
        byte: u8,
    },
    Zero {
        sector: u64,
        sectors: u64,
        unmap: bool,
    },
    Fork,
    /// Continues in a disk made of the last image, as after a reset.
    Back,
}

fn act() -> impl Strategy<Value = Act> {
    let range = run(SIZE / SECTOR, 24);
    prop_oneof![
        6 => (range.clone(), any::<u8>())
            .prop_map(|((sector, sectors), byte)| Act::Write { sector, sectors, byte }),
        2 => (range, any::<bool>()).prop_map(|((sector, sectors), unmap)| Act::Zero { sector, sectors, unmap }),
        2 => Just(Act::Fork),
        1 => Just(Act::Back),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn what_changed_is_what_a_model_says_and_layers_are_the_disk_again(acts in prop::collection::vec(act(), 1..32)) {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut model) = file(dir.path());
        let config = DiskConfig::new(&path);
        let mut disk = Disk::open(&config).unwrap();
        let mut images: Vec<(DiskImage, Vec<u8>)> = Vec::new();
        for act in acts.into_iter().chain([Act::Fork]) {
            match act {
                Act::Write { sector, sectors, byte } => {
                    let bytes = vec![byte; (sectors * SECTOR) as usize];
                    write(&mut disk, sector * SECTOR, &bytes);
                    model[(sector * SECTOR) as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                Act::Zero { sector, sectors, unmap } => {
                    let (offset, len) = (sector * SECTOR, sectors * SECTOR);
                    disk.submit(DiskOp::Zero { offset, len, unmap }, 1).unwrap();
                    finish(&mut disk);
                    model[offset as usize..(offset + len) as usize].fill(0);
                }
                Act::Fork => images.push((disk.fork(), model.clone())),
                Act::Back => {
                    if let Some((image, then)) = images.last() {
                        disk = image.open().unwrap();
                        model.clone_from(then);
                    }
                }
            }
        }
        for (image, then) in &images {
            prop_assert!(&whole(image) == then, "an image is its instant");
            let runs = image.runs().unwrap();
            let joined: u64 = runs.iter().map(|run| run.clusters.end - run.clusters.start).sum();
            prop_assert_eq!(joined, image.clusters());
            for run in runs.iter().filter(|run| run.zero) {
                prop_assert!(then[bytes_of(run, SIZE)].iter().all(|byte| *byte == 0), "{:?}", run);
            }
        }
        for (at, (newer, now)) in images.iter().enumerate() {
            for (older, then) in &images[..=at] {
                let runs = newer.changed_since(older).unwrap();
                for cluster in 0..newer.clusters() {
                    let range = bytes_of(&DiskRun { clusters: cluster..cluster + 1, zero: false }, SIZE);
                    let same = now[range.clone()] == then[range];
                    prop_assert!(same || covers(&runs, cluster), "cluster {} changed", cluster);
                }
            }
        }
        let mut layers = Vec::new();
        for (at, (image, now)) in images.iter().enumerate() {
            let runs = match at.checked_sub(1) {
                None => image.runs().unwrap(),
                Some(before) => image.changed_since(&images[before].0).unwrap(),
            };
            layers.push(layer(dir.path(), at, image, runs));
            let again = DiskImage::from_layers(&config, SIZE, &layers).unwrap();
            prop_assert!(&whole(&again) == now, "layer {}", at);
        }
    }
}

#[test]
fn nothing_changed_since_is_no_run_and_holes_are_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let (path, model) = file(dir.path());
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    let first = disk.fork();
    assert_eq!(whole(&first), model);
    let runs = first.runs().unwrap();
    let run = |clusters, zero| DiskRun { clusters, zero };
    assert_eq!(runs, [run(0..20, false), run(20..30, true), run(30..41, false)]);
    assert_eq!(disk.fork().changed_since(&first).unwrap(), []);
    write(&mut disk, 25 * CLUSTER + SECTOR, &[7; 512]);
    assert_eq!(disk.fork().changed_since(&first).unwrap(), [run(25..26, false)]);
}

/// The rest of a file that was cut looks like a hole, and would be saved as zeros.
#[test]
fn a_file_that_was_cut_is_no_hole() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = file(dir.path());
    let image = Disk::open(&DiskConfig::new(&path)).unwrap().fork();
    let layers = [layer(dir.path(), 0, &image, image.runs().unwrap())];
    let mut config = DiskConfig::new(&path);
    config.overlays = Some(dir.path().to_owned());
    let restored = DiskImage::from_layers(&config, SIZE, &layers).unwrap();
    let older = DiskImage::from_layers(&config, SIZE, &[]).unwrap();
    let cut = dir.path().join("layer0");
    // In the last cluster, in a run of data, in the hole, and where only zeros of the layer follow.
    for len in [SIZE - 1, 35 * CLUSTER, 25 * CLUSTER, 5 * CLUSTER, 0] {
        fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(len).unwrap();
        for refused in [restored.runs(), restored.changed_since(&older)] {
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("layer0") && text.contains(&format!("there are {:#x}", len / CLUSTER)), "{text}");
        }
    }
}

#[test]
fn what_an_older_disk_did_not_reach_has_changed() {
    let dir = tempfile::tempdir().unwrap();
    let config = DiskConfig::new(&dir.path().join("disk.img"));
    let zeros = |clusters: u64| DiskImage::from_layers(&config, clusters * CLUSTER, &[]).unwrap();
    assert_eq!(zeros(5).changed_since(&zeros(3)).unwrap(), [DiskRun { clusters: 3..5, zero: true }]);
    assert_eq!(zeros(3).changed_since(&zeros(5)).unwrap(), []);
}

#[test]
fn a_disk_made_of_layers_writes_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut model) = file(dir.path());
    let image = Disk::open(&DiskConfig::new(&path)).unwrap().fork();
    let layers = [layer(dir.path(), 0, &image, image.runs().unwrap())];
    let written = fs::read(dir.path().join("layer0")).unwrap();
    let overlays = tempfile::tempdir().unwrap();
    // The image itself may be gone, with its directory.
    let mut config = DiskConfig::new("/no/such/directory/disk.img".as_ref());
    let refused = DiskImage::from_layers(&config, SIZE, &layers).unwrap_err().to_string();
    assert!(refused.contains("/no/such/directory"), "{refused}");
    config.overlays = Some(overlays.path().to_owned());
    let restored = DiskImage::from_layers(&config, SIZE, &layers).unwrap();
    let (mut one, mut two) = (restored.open().unwrap(), restored.open().unwrap());
    write(&mut one, 3 * CLUSTER + SECTOR, &[0xaa; 1024]);
    one.submit(DiskOp::Zero { offset: 0, len: CLUSTER, unmap: true }, 1).unwrap();
    one.submit(DiskOp::Flush, 2).unwrap();
    finish(&mut one);
    assert_eq!(read(&mut two, 0, SIZE as usize), model, "one's writes are one's own");
    model[3 * 4096 + 512..3 * 4096 + 1536].fill(0xaa);
    model[..4096].fill(0);
    assert_eq!(read(&mut one, 0, SIZE as usize), model);
    assert_eq!(one.fork().changed_since(&restored).unwrap().len(), 2);
    let (_, refused) = *one.commit().unwrap_err();
    assert!(matches!(&refused, CommitError::Snapshot { path } if path.ends_with("disk.img")), "{refused}");
    assert_eq!(fs::read(dir.path().join("layer0")).unwrap(), written, "a snapshot's file stays as it is");
    assert_eq!(fs::read_dir(overlays.path()).unwrap().count(), 0, "overlays have no name");
}

#[test]
fn layers_that_do_not_fit_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer");
    fs::write(&path, vec![1; 3 * CLUSTER as usize]).unwrap();
    let mut config = DiskConfig::new(&dir.path().join("disk.img"));
    config.overlays = Some(dir.path().to_owned());
    let open = |write| Some(Arc::new(IoFile::open(&path, write, CachePolicy::Host).unwrap()));
    let refused = |size, file: &Option<Arc<IoFile>>, clusters: Range<u64>, zero| {
        let layer = DiskLayer { file: file.clone(), runs: vec![DiskRun { clusters, zero }] };
        DiskImage::from_layers(&config, size, &[layer]).unwrap_err().to_string()
    };
    let size = 4 * CLUSTER;
    let written = refused(size, &open(true), 0..1, false);
    assert!(written.contains("open for writing") && written.contains("/layer"), "{written}");
    let file = open(false);
    for (clusters, zero, there) in [(2..4, false, 3), (0..5, true, 4), (u64::MAX - 1..u64::MAX, true, 4)] {
        let text = refused(size, &file, clusters.clone(), zero);
        let wanted = format!("clusters {:#x} to {:#x}; there are {there:#x}", clusters.start, clusters.end);
        assert!(text.contains(&wanted), "{text}");
    }
    assert!(refused(size, &file, 1..1, true).contains("clusters 0x1 to 0x1"));
    assert!(refused(size, &None, 1..2, false).contains("no file"));
    for size in [0, 100, 513, u64::MAX / 512 * 512] {
        assert!(refused(size, &file, 0..1, true).contains(&format!("{size:#x}")));
    }
    // A file as long as the disk, whose last cluster is a short one.
    let short = 3 * CLUSTER - SECTOR;
    let layer = DiskLayer { file, runs: vec![DiskRun { clusters: 0..3, zero: false }] };
    assert_eq!(whole(&DiskImage::from_layers(&config, short, &[layer]).unwrap()), vec![1; short as usize]);
}

#[test]
fn what_is_still_being_written_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = file(dir.path());
    let mut config = DiskConfig::new(&path);
    config.latency = Some(Duration::from_millis(1000));
    let mut disk = Disk::open(&config).unwrap();
    let buffers = buffer(&[9; 4096]);
    disk.submit(DiskOp::Write { offset: 22 * CLUSTER, buffers }, 1).unwrap();
    disk.kick().unwrap();
    let image = disk.fork();
    let refused = image.read_at(0, &mut [0; 16]).unwrap_err().to_string();
    assert!(refused.contains("disk.img") && refused.contains("in flight"), "{refused}");
    assert!(image.runs().unwrap().iter().all(|run| !run.zero), "a hole may be filled yet");
    // A disk that continues from the image refuses too, though it has no request in flight.
    let heir = image.open().unwrap().fork();
    assert!(heir.read_at(0, &mut [0; 16]).is_err());
    finish(&mut disk);
    settle(&image);
    settle(&heir);
    let mut cluster = [0; 4096];
    heir.read_at(22 * CLUSTER, &mut cluster).unwrap();
    assert_eq!(cluster, [9; 4096]);
    assert_eq!(heir.changed_since(&image).unwrap(), []);
}

/// A disk that was forked, written and forked again.
struct Twice {
    dir: tempfile::TempDir,
    path: PathBuf,
    _disk: Disk,
    older: DiskImage,
    image: DiskImage,
}

impl Twice {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = file(dir.path());
        let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
        let older = disk.fork();
        write(&mut disk, 0, &[7; 4096]);
        let image = disk.fork();
        Self { dir, path, _disk: disk, older, image }
    }

    fn export(&self) -> PathBuf {
        self.dir.path().join("export")
    }

    /// The image as another process has it.
    fn received(&self) -> DiskImage {
        let (_, lease) = std::io::pipe().unwrap();
        let layers = self.image.shared_layers(&Arc::new(lease.into())).unwrap();
        DiskImage::from_layers(self.image.config(), self.image.size(), &layers).unwrap()
    }
}

/// Its pages may show what was there before the lost write, and a copy would have that for good. The system reports
/// the loss once.
#[test]
fn no_copy_is_made_of_a_file_whose_write_was_lost() {
    fn exported(twice: &Twice) -> Result<(), DiskError> {
        twice.image.export(&twice.export())?;
        fs::remove_file(twice.export()).unwrap();
        Ok(())
    }
    type Copy = fn(&Twice) -> Result<(), DiskError>;
    let copies: [(Copy, usize); 5] = [
        (|twice| twice.image.runs().map(drop), 2),
        (|twice| twice.image.changed_since(&twice.older).map(drop), 1),
        (exported, 2),
        (|twice| twice.image.detached(&|_| Ok(false)).map(drop), 2),
        (|twice| twice.image.detached(&|file| Ok(file.path() == twice.path)).map(drop), 1),
    ];
    for (number, (copy, files)) in copies.into_iter().enumerate() {
        let twice = Twice::new();
        let (done, steps) = traced(None, || copy(&twice));
        done.unwrap();
        let syncs: Vec<usize> = (0..steps.len()).filter(|at| steps[*at].starts_with("sync ")).collect();
        assert_eq!(syncs.len(), files, "copy {number}: {steps:?}");
        for at in syncs {
            let twice = Twice::new();
            let refused = traced(Some(at), || copy(&twice)).0.map_err(|error| error.to_string());
            assert!(matches!(&refused, Err(text) if text.contains("made durable")), "copy {number}: {refused:?}");
            assert!(!twice.export().exists());
            // The next sync of the file would succeed.
            let child = twice.image.open().unwrap().fork();
            for again in [copy(&twice), twice.received().runs().map(drop), child.runs().map(drop)] {
                let text = again.map_err(|error| error.to_string()).unwrap_err();
                assert!(text.contains("a write to it was lost"), "copy {number}: {text}");
            }
        }
    }
    // A file without a sync, as in a file system that is never written.
    let path = PathBuf::from("null");
    let null = IoFile::read_only(File::open("/dev/null").unwrap(), &path, CachePolicy::Host);
    assert!(null.sync_now().is_err());
    sync_to_copy(&null).unwrap();
    assert!(!null.knows_lost_writes());
}

/// Requests, forks and snapshots never show an overlay's contents from a previous owner.
#[test]
fn an_overlay_that_was_somebody_elses_shows_nothing_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, model) = file(dir.path());
    let mut disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    let first = disk.fork();
    let old = vec![0xaa; SIZE as usize];
    let mut child = first.open().unwrap();
    write(&mut child, 0, &old);
    drop(child);
    // The reused overlay, with all of that in it.
    let mut next = first.open().unwrap();
    let mut want = model.clone();
    let put = |disk: &mut Disk, want: &mut Vec<u8>, sector: u64, sectors: u64, byte: u8| {
        let (from, len) = (sector * SECTOR, (sectors * SECTOR) as usize);
        write(disk, from, &vec![byte; len]);
        want[from as usize..from as usize + len].fill(byte);
    };
    put(&mut next, &mut want, 3, 1, 1);
    put(&mut next, &mut want, 165, 20, 2);
    put(&mut next, &mut want, SIZE / SECTOR - 2, 2, 3);
    assert_eq!(next.chain.active().map(|own| own.next_data(0).unwrap()), Some(Some(0)), "it is that one");
    assert_eq!(read(&mut next, 0, SIZE as usize), want);
    let image = next.fork();
    assert_eq!(whole(&image), want);
    let changed = image.changed_since(&first).unwrap();
    let clusters: Vec<_> = (0..image.clusters()).filter(|cluster| covers(&changed, *cluster)).collect();
    assert_eq!(clusters, [0, 20, 21, 22, 23, 40]);
    let base = layer(dir.path(), 0, &first, first.runs().unwrap());
    let delta = layer(dir.path(), 1, &image, changed);
    let again = DiskImage::from_layers(&DiskConfig::new(&path), SIZE, &[base, delta]).unwrap();
    assert_eq!(whole(&again), want);
    assert_eq!(whole(&first), model);
}

/// The image file stays locked as long as another process uses any file of the disk, even if it
/// uses none of that file's clusters and the process that gave the layers away has ended.
#[test]
fn layers_given_away_keep_the_image_file_locked() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = file(dir.path());
    let config = DiskConfig::new(&path);
    let mut disk = Disk::open(&config).unwrap();
    drop(disk.fork());
    let all = vec![7; SIZE as usize];
    write(&mut disk, 0, &all);
    let image = disk.fork();
    let (ours, lease) = std::io::pipe().unwrap();
    let layers = image.shared_layers(&Arc::new(lease.into())).unwrap();
    assert!(layers.iter().all(|layer| layer.file.as_ref().unwrap().path() != path), "only overlays are shown");
    drop((disk, image, ours));
    let refused = Disk::open(&config).unwrap_err();
    assert!(refused.to_string().contains("use"), "{refused}");
    drop(layers);
    drop(Disk::open(&config).unwrap());
}
