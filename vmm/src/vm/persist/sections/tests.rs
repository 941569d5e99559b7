use clade_block::{Disk, DiskConfig};
use clade_devices::virtio::balloon::{Balloon, BalloonState};
use clade_devices::virtio::block::{Block, BlockOptions, InFlight};
use clade_devices::virtio::console::ConsoleDevice;
use clade_devices::virtio::limiter::{Limits, Rate};
use clade_devices::virtio::rng::Rng;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::VsockOptions;
use clade_devices::virtio::{EventFds, VirtioDevice, VirtioMmio};
use clade_devices::{Console, Irq, SerialConsole};
use clade_memory::{GuestRam, Quiesced, Store};
use kvm_bindings::{CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_msr_entry};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::vm::config::DiskSpec;

fn vcpu(rip: u64) -> VcpuState {
    let mut state = VcpuState {
        cpuid: CpuId::from_entries(&[kvm_cpuid_entry2 { function: 1, ecx: 1 << 20, ..Default::default() }]).unwrap(),
        tsc_khz: Some(2_100_000),
        mp_state: Default::default(),
        regs: Default::default(),
        sregs: Default::default(),
        xsave: Xsave::new(7).unwrap(),
        xcrs: Default::default(),
        debug_regs: Default::default(),
        msrs: Msrs::from_entries(&[kvm_msr_entry { index: 0x10, data: 99, ..Default::default() }; 3]).unwrap(),
        lapic: Default::default(),
        events: Default::default(),
        taken: Default::default(),
        taken_in_boot: crate::kvm::BootTime::now(),
        page_fault_entry: Some(0xffff_ffff_81c0_0c20),
    };
    state.regs.rip = rip;
    state
}

/// An image of a VM with a disk, entropy, a balloon and a console, and the directory the disk is
/// in.
fn image() -> (ForkImage, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, vec![1; 1 << 16]).unwrap();
    let mut config = VmConfig::new(1 << 20, 2).unwrap();
    config.irqchip = crate::vm::Irqchip::Split;
    config.hide = "avx512f".parse().unwrap();
    let disk = DiskConfig { id: Some("id".into()), ..DiskConfig::new(&path) };
    let device = BlockOptions { queues: 2, ..BlockOptions::default() };
    config.disks = vec![DiskSpec { disk: disk.clone(), device }];
    config.rng = Some(Limits { bytes: Some(Rate::per_second(77)), operations: None });
    (config.balloon, config.virtio_console) = (true, true);
    let ram = GuestRam::reserve(config.layout(), &Store::open_small().unwrap()).unwrap();
    ram.populate().unwrap();
    let all: [Box<dyn VirtioDevice>; 4] = [
        Box::new(Block::new(Disk::open(&disk).unwrap(), &device)),
        Box::new(SyncDevice::new(Rng::new(&Limits::default()))),
        Box::new(SyncDevice::new(Balloon::new(&BalloonState { target: 5, ..Default::default() }).unwrap())),
        Box::new(SyncDevice::new(ConsoleDevice::new(Console::default()).unwrap())),
    ];
    let saved = all.into_iter().map(|device| {
        let event_fds = EventFds::new(device.queue_sizes().len()).unwrap();
        VirtioMmio::new(device, &ram, event_fds, true).save().unwrap()
    });
    let (virtio, backends) = saved.unzip();
    let serial = SerialConsole::new(Irq::new().unwrap(), Console::default()).save();
    let clock = json!({ "irqchips": null, "pit": null, "clock": [7, 0, 0, 0, 0, 0, 0, 0] });
    let image = ForkImage {
        config: Arc::new(config),
        ram: ram.freeze(&Quiesced::by(&clade_memory::NoWriters)).unwrap().0,
        vcpus: vec![vcpu(0x1000), vcpu(0x2000)],
        vm: serde_json::from_value(clock).unwrap(),
        devices: DevicesState { serial, virtio },
        backends,
        identity: Arc::default(),
        generation: 3,
        place: None,
    };
    (image, dir)
}

type Sections = Vec<(&'static str, Vec<u8>)>;

fn restored(sections: &Sections, like: &ForkImage) -> Result<ForkImage, SavedError> {
    let sections = sections.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
    ForkImage::from_sections(sections, like.ram.clone(), like.backends.clone())
}

/// The sections of `image`, with one of them modified by `change`.
fn changed<T: Serialize + DeserializeOwned>(
    image: &ForkImage,
    section: &'static str,
    change: impl FnOnce(&mut T),
) -> Sections {
    let mut sections = image.sections().unwrap();
    let at = SECTIONS.iter().position(|name| *name == section).unwrap();
    let mut value: T = read(&[(section, &sections[at].1)], section).unwrap();
    change(&mut value);
    sections[at] = write(section, &value).unwrap();
    sections
}

fn refusal(sections: &Sections, like: &ForkImage) -> String {
    crate::error_chain(&restored(sections, like).unwrap_err())
}

#[test]
fn an_image_comes_back_as_it_was() {
    let (image, _dir) = image();
    let sections = image.sections().unwrap();
    assert_eq!(sections.iter().map(|(name, _)| *name).collect::<Vec<_>>(), SECTIONS);
    let again = restored(&sections, &image).unwrap();
    assert_eq!(again.sections().unwrap(), sections);
    assert_eq!(*again.config, *image.config);
    assert_eq!(again.devices, image.devices);
    assert_eq!((again.generation, again.vcpus[1].regs.rip, again.vm.clock_ns()), (3, 0x2000, 7));
    assert_eq!(again.vcpus[0].msrs.as_slice()[0].data, 99);
    let as_read = || sections.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
    assert_eq!(host_requirements(as_read()).unwrap(), image.host_requirements());
    assert_eq!(config(as_read()).unwrap(), *image.config);
}

#[test]
fn what_is_not_known_is_skipped() {
    let (image, _dir) = image();
    let mut sections = changed::<ciborium::Value>(&image, VCPUS, |vcpus| {
        let vcpu = vcpus.as_array_mut().unwrap()[0].as_map_mut().unwrap();
        vcpu.push(("from_later".into(), 5.into()));
    });
    sections.push(("later", vec![0xff]));
    assert!(restored(&sections, &image).is_ok());
}

#[test]
fn sections_that_do_not_fit_each_other_are_refused_by_name() {
    let (image, _dir) = image();
    let refused = |sections: &Sections| refusal(sections, &image);
    let vcpus = |change: fn(&mut Vec<VcpuState>)| refused(&changed(&image, VCPUS, change));
    assert_eq!(vcpus(|v| drop(v.pop())), "section \"vcpus\": vCPUs: 1, must be 2");
    let text = vcpus(|v| {
        let one = v[0].clone();
        v.resize(usize::from(crate::platform::MAX_CPUS) + 1, one);
    });
    assert!(text.contains("cannot be read"), "{text}");
    let text = vcpus(|v| v[1].msrs = Msrs::from_entries(&[kvm_msr_entry::default()]).unwrap());
    assert_eq!(text, "section \"vcpus\": MSRs of vCPU 1: 1, must be 3");
    let text = vcpus(|v| v[1].msrs.as_mut_slice()[2].index = 0x11);
    assert_eq!(text, "section \"vcpus\": index of MSR 2 of vCPU 1: 17, must be 16");
    let text = vcpus(|v| v[1].xsave = Xsave::new(6).unwrap());
    assert_eq!(text, "section \"vcpus\": words of the XSAVE area of vCPU 1: 6, must be 7");

    let config = |change: fn(&mut VmConfig)| refused(&changed(&image, CONFIG, change));
    let text = config(|c| *c = VmConfig::new(2 << 20, 2).unwrap());
    assert_eq!(text, "section \"config\": bytes of memory: 2097152, must be 1048576");
    assert_eq!(config(|c| c.disks[0].device.queues = 99), "section \"config\": queues of disk 0: 99, must be 16");
    assert_eq!(
        config(|c| c.irqchip = crate::vm::Irqchip::Full),
        "section \"vm\" is the state of None, and the configuration has Irqchip"
    );
    assert_eq!(config(|c| c.balloon = false), "section \"devices\": virtio devices: 4, must be 3");
    let text = config(|c| c.disks[0].device.queues = 1);
    assert_eq!(text, "section \"devices\": queues of device 0: 2, must be 1");
    let text = config(|c| c.disks[0].disk.read_only = true);
    assert!(text.contains("device 0 is of kind \"writable disk\""), "{text}");
    assert!(config(|c| c.disks = vec![c.disks[0].clone(); 17]).contains("20 virtio devices"));

    let text = refused(&changed::<DevicesState>(&image, DEVICES, |d| d.virtio.swap(1, 3)));
    assert_eq!(text, "section \"devices\": device 1 is of kind \"console\", must be \"entropy\"");
    for (queue, head, times) in [(1, 256, 1), (2, 0, 1), (0, 0, 257)] {
        let text = refused(&changed::<DevicesState>(&image, DEVICES, |devices| {
            let VirtioState::Block(block) = &mut devices.virtio[0].device else { unreachable!() };
            block.in_flight = vec![InFlight { queue, head }; times];
        }));
        assert!(text.contains(&format!("in flight at {head} of queue {queue}")), "{text}");
    }
    let text = refused(&changed::<SavedIdentity>(&image, IDENTITY, |own| {
        own.identity.vsock = Some(VsockOptions { cid: 3, socket: "/s".into() });
    }));
    assert_eq!(text, "section \"identity\": socket devices: 1, must be 0");

    let mut sections = image.sections().unwrap();
    sections[2].1.push(0);
    assert_eq!(refused(&sections), "section \"vcpus\" has 1 bytes behind its end");
    let removed = sections.remove(2);
    assert_eq!(refused(&sections), "there is no section \"vcpus\"");
    sections.extend([removed.clone(), removed]);
    assert_eq!(refused(&sections), "section \"vcpus\" is there more than once");
    // Of lists without end in a configuration, a byte takes 24 in memory.
    for (at, name) in [CONFIG, IDENTITY].map(|name| (SECTIONS.iter().position(|own| *own == name).unwrap(), name)) {
        let mut sections = image.sections().unwrap();
        sections[at].1.resize(MAX_SMALL + 1, 0);
        assert_eq!(refused(&sections), format!("section {name:?} has 1048577 bytes, of at most 1048576"));
        sections[at].1.pop();
        assert!(refused(&sections).contains("bytes behind its end"));
    }
    let no_disk = ForkImage { backends: vec![Backend::None; 4], ..image.clone() };
    let text = refusal(&image.sections().unwrap(), &no_disk);
    assert_eq!(text, "section \"devices\": device 0 is of kind \"without a disk\", must be \"block\"");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_damage_is_refused_or_read_and_nothing_else(
        section in 0..SECTIONS.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8u32), 0..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        stuffing in prop::collection::vec(any::<u8>(), 0..9),
    ) {
        let (image, _dir) = image();
        let mut sections = image.sections().unwrap();
        let bytes = &mut sections[section].1;
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            let at = cut.index(bytes.len());
            bytes.splice(at.., stuffing);
        }
        match restored(&sections, &image) {
            // An accepted image can be written and read again.
            Ok(read) => {
                let again = read.sections().unwrap();
                prop_assert_eq!(restored(&again, &image).unwrap().sections().unwrap(), again);
            }
            Err(error) => {
                let text = error.to_string();
                prop_assert!(SECTIONS.iter().any(|name| text.contains(&format!("{name:?}"))), "{}", text);
            }
        }
        let facts = sections.iter().map(|(name, bytes)| (*name, bytes.as_slice()));
        let _either = host_requirements(facts);
    }
}
