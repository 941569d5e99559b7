//! Any schedule of writes, forks, flushes and crashes.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Act {
    Write {
        sector: u64,
        sectors: u64,
        byte: u8,
    },
    Zero {
        cluster: u64,
        clusters: u64,
    },
    Fork,
    Rewind,
    /// With later writes, cancelled half-way or not; or two flushes.
    Flush {
        cancelled: bool,
        twice: bool,
    },
    /// The process ends, and another one opens the image.
    Crash,
    Commit,
}

fn act() -> impl Strategy<Value = Act> {
    let sectors = run(SIZE / SECTOR, 40);
    let clusters = run(CLUSTERS, 10);
    prop_oneof![
        12 => (sectors, any::<u8>()).prop_map(|((sector, sectors), byte)| Act::Write { sector, sectors, byte }),
        2 => clusters.prop_map(|(cluster, clusters)| Act::Zero { cluster, clusters }),
        6 => Just(Act::Fork),
        1 => Just(Act::Rewind),
        5 => (prop::bool::weighted(0.3), any::<bool>())
            .prop_map(|(cancelled, twice)| Act::Flush { cancelled, twice }),
        1 => Just(Act::Crash),
        1 => Just(Act::Commit),
    ]
}

/// Sectors as they are now, as they were at the last successful flush, and their contents since.
struct Model {
    now: Vec<u8>,
    durable: Vec<u8>,
    since: Vec<BTreeSet<u8>>,
}

impl Model {
    fn new() -> Self {
        let sectors = (SIZE / SECTOR) as usize;
        Self { now: vec![1; sectors], durable: vec![1; sectors], since: vec![BTreeSet::new(); sectors] }
    }

    fn set(&mut self, sectors: Range<u64>, byte: u8) {
        for sector in sectors {
            self.now[sector as usize] = byte;
            self.since[sector as usize].insert(byte);
        }
    }

    /// All sectors were flushed as they were `then`.
    fn flushed(&mut self, then: Vec<u8>) {
        self.durable = then;
        self.since.iter_mut().for_each(BTreeSet::clear);
    }
}

/// One byte per sector: all bytes of a sector are equal.
fn sectors_of(bytes: &[u8]) -> Vec<u8> {
    let sectors = bytes.chunks(SECTOR as usize);
    sectors
        .inspect(|sector| assert!(sector.iter().all(|byte| *byte == sector[0]), "torn"))
        .map(|sector| sector[0])
        .collect()
}

/// Waits until requests have ended, and returns whether all succeeded. Moves may continue.
fn all_well(disk: &mut Disk) -> bool {
    let mut well = true;
    disk.kick().unwrap();
    loop {
        for done in disk.take_done().into_iter().chain(disk.reap().unwrap()) {
            well &= done.result.is_ok();
        }
        if disk.requests.in_flight() == 0 {
            return well;
        }
        disk.wait(SOON).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    /// Whenever the process ends, each sector has its content at the last successful flush, or a
    /// content written since.
    #[test]
    fn what_was_flushed_survives(acts in prop::collection::vec(act(), 1..70), late in any::<bool>()) {
        let bench = Bench::new();
        let latency = late.then_some(Duration::from_micros(300));
        let open = || {
            let mut disk = Disk::open(&DiskConfig { latency, ..DiskConfig::new(&bench.path) }).unwrap();
            *disk.chain.relocation_mut() = Relocation::at_most(3, 1);
            disk
        };
        let (mut disk, mut model, mut last) = (open(), Model::new(), None);
        for (token, act) in (2u64..).zip(acts) {
            match act {
                Act::Write { sector, sectors, byte } => {
                    begin_write(&mut disk, sector * SECTOR, &vec![byte; (sectors * SECTOR) as usize], token);
                    all_well(&mut disk);
                    model.set(sector..sector + sectors, byte);
                }
                Act::Zero { cluster, clusters } => {
                    let (offset, end) = (cluster * CLUSTER, ((cluster + clusters) * CLUSTER).min(SIZE));
                    disk.submit(DiskOp::Zero { offset, len: end - offset, unmap: true }, token).unwrap();
                    all_well(&mut disk);
                    model.set(offset / SECTOR..end / SECTOR, 0);
                }
                Act::Fork => last = Some((disk.fork(), model.now.clone())),
                Act::Rewind => {
                    let Some((image, then)) = &last else { continue };
                    disk.settle_moves();
                    prop_assert!(disk.rewind(image));
                    for (sector, byte) in then.iter().enumerate() {
                        if model.now[sector] != *byte {
                            model.set(sector as u64..sector as u64 + 1, *byte);
                        }
                    }
                }
                Act::Flush { cancelled, twice } => {
                    let then = model.now.clone();
                    disk.submit(DiskOp::Flush, token).unwrap();
                    if twice {
                        disk.submit(DiskOp::Flush, 1).unwrap();
                    }
                    disk.kick().unwrap();
                    if cancelled {
                        disk.cancel();
                        if all_well(&mut disk) {
                            model.flushed(then);
                        }
                        continue;
                    }
                    // Beside the flush.
                    let (sector, byte) = (token * 13 % (SIZE / SECTOR), token as u8 | 0x80);
                    begin_write(&mut disk, sector * SECTOR, &[byte; SECTOR as usize], u64::MAX - token);
                    prop_assert!(all_well(&mut disk), "a flush that nobody cancels succeeds");
                    model.flushed(then);
                    model.set(sector..sector + 1, byte);
                }
                Act::Crash => {
                    last = None;
                    drop(disk);
                    disk = open();
                    let found = sectors_of(&read(&mut disk, 0, SIZE as usize));
                    for (sector, byte) in found.iter().enumerate() {
                        let may = *byte == model.durable[sector] || model.since[sector].contains(byte);
                        let (was, since) = (model.durable[sector], &model.since[sector]);
                        prop_assert!(may, "sector {sector} is {byte}, was {was} when it was flushed, and since {since:?}");
                    }
                    model.now.clone_from(&found);
                    model.flushed(found);
                }
                Act::Commit => {
                    last = None;
                    let committed = disk.commit();
                    prop_assert!(committed.is_ok(), "{:?}", committed.map_err(|refused| refused.1));
                    prop_assert_eq!(&sectors_of(&bench.image()), &model.now);
                    prop_assert!(!bench.journal.exists());
                    model.flushed(model.now.clone());
                    disk = open();
                }
            }
        }
        finish(&mut disk);
        prop_assert_eq!(&sectors_of(&read(&mut disk, 0, SIZE as usize)), &model.now);
    }
}
