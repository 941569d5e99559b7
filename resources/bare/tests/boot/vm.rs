//! Just enough of a VMM: memory, one loader, a thread per vCPU.

use clade_guests::{
    BARE_ELF,
    abi::{Command, DOORBELL, Event, PAGE_SIZE, REPORT_PORT, Report, State, Status, mailbox_gpa, offset},
};
use clade_test_support::{receive, wait_eq};
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_msi, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::{
    io,
    os::unix::thread::JoinHandleExt,
    ptr,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// Addresses of the local APIC, and of messages for local APICs.
const APIC: u64 = 0xfee0_0000;
const APIC_END: u64 = APIC + PAGE_SIZE;
const GAP_START: u64 = 0xc000_0000;
const GAP_END: u64 = 1 << 32;
/// Address of hvm_start_info or boot_params, and of the tables behind the former.
const BOOT_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
/// For the 64-bit entry, which must find itself mapped.
const LOADER_TABLES: u64 = 0x1_0000;

type Error = Box<dyn std::error::Error>;

/// The way that the first vCPU enters the guest.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Entry {
    Pvh,
    Linux,
}

/// The interrupt controllers that KVM has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Irqchip {
    None,
    /// The local APICs only.
    Split,
    Full,
}

/// The boot configuration.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) memory: u64,
    pub(crate) vcpus: u64,
    pub(crate) irqchip: Irqchip,
    pub(crate) entry: Entry,
}

/// A running guest. All its vCPUs have reported READY.
pub(crate) struct Vm {
    // Dropped in this order: no vCPU may run in memory that is gone.
    vcpus: VcpuThreads,
    vm: VmFd,
    irqchip: Irqchip,
    memory: Memory,
    /// From the first KVM_RUN to the last READY.
    pub(crate) boot_time: Duration,
}

impl Vm {
    pub(crate) fn boot(layout: Layout) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be used: {error}"))?;
        let vm = kvm.create_vm().map_err(|error| format!("no VM can be created: {error}"))?;
        Ok(Self::boot_on(&kvm, vm, layout).expect("KVM accepts the VM"))
    }

    fn boot_on(kvm: &Kvm, vm: VmFd, layout: Layout) -> Result<Self, Error> {
        let memory = Memory::new(layout.memory)?;
        vm.set_tss_address(0xfffb_d000)?;
        // Before the irqchip, because a memory slot takes milliseconds once there is one.
        for (slot, (gpa, offset, size)) in (0..).zip(memory.ranges()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: memory.base as u64 + offset,
            };
            // SAFETY: the mapping outlives the VM, see the order of Vm's fields, and regions do not
            // overlap.
            unsafe { vm.set_user_memory_region(region)? };
        }
        match layout.irqchip {
            Irqchip::None => {}
            Irqchip::Split => {
                let pins = 24;
                vm.enable_cap(&kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    args: [pins, 0, 0, 0],
                    ..Default::default()
                })?;
            }
            Irqchip::Full => vm.create_irq_chip()?,
        }
        let entry = load(&memory);
        write_boot_info(&memory, layout.entry);

        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let (mut fds, mut start) = (Vec::new(), Instant::now());
        for index in 0..layout.vcpus {
            let vcpu = vm.create_vcpu(index)?;
            vcpu.set_cpuid2(&with_apic_id(cpuid.clone(), index as u32))?;
            if index == 0 {
                match layout.entry {
                    Entry::Pvh => enter_protected_mode(&vcpu, entry.pvh)?,
                    Entry::Linux => enter_long_mode(&vcpu, &memory, entry.linux)?,
                }
                start = Instant::now();
            }
            fds.push(vcpu);
        }
        let vcpus = VcpuThreads::start(fds);
        let irqchip = layout.irqchip;
        let mut vm = Self { vcpus, vm, irqchip, memory, boot_time: Duration::ZERO };
        for _ in 0..layout.vcpus {
            let report = vm.report();
            assert_eq!((report.event, report.seq), (Event::Ready, 0), "vCPU {}", report.vcpu);
        }
        vm.boot_time = start.elapsed();
        Ok(vm)
    }

    /// Gives a command and returns its number.
    pub(crate) fn give(&self, vcpu: u64, command: Command) -> u64 {
        let (code, args) = command.encode();
        let mailbox = mailbox_gpa(vcpu);
        self.store(mailbox + offset::COMMAND, code);
        for (index, arg) in (0..).zip(args) {
            self.store(mailbox + offset::ARGS + index * 8, arg);
        }
        let seq = self.mailbox(vcpu, offset::CMD_SEQ) + 1;
        self.store(mailbox + offset::CMD_SEQ, seq);
        self.ring(vcpu);
        seq
    }

    /// Wakes a vCPU that waits for a command.
    pub(crate) fn ring(&self, vcpu: u64) {
        if matches!(self.irqchip, Irqchip::None) {
            return;
        }
        let address_lo = (APIC | vcpu << 12) as u32;
        let message = kvm_msi { address_lo, data: u32::from(DOORBELL), ..Default::default() };
        self.vm.signal_msi(message).expect("KVM delivers the message");
    }

    /// Processor time of all vCPUs' threads.
    pub(crate) fn processor_time(&self) -> Duration {
        let of = |thread: &JoinHandle<()>| {
            let mut clock = 0;
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the handle is not joined yet, so the thread's id is valid, and both results
            // are this function's.
            let read = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
            assert_eq!(read, 0, "the thread has a clock");
            // SAFETY: the clock is that of a thread that runs, and the result is this function's.
            let read = unsafe { libc::clock_gettime(clock, &raw mut time) };
            assert_eq!(read, 0, "the clock can be read");
            Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
        };
        self.vcpus.threads.iter().map(of).sum()
    }

    /// Gives a command and waits for its report.
    pub(crate) fn run(&self, vcpu: u64, command: Command) -> Event {
        let seq = self.give(vcpu, command);
        let report = self.report();
        assert_eq!((u64::from(report.vcpu), report.seq), (vcpu, seq as u16), "{report:?} is not about {command:?}");
        if matches!(report.event, Event::Done | Event::Mismatch) {
            assert_eq!(self.mailbox(vcpu, offset::DONE_SEQ), seq);
        }
        report.event
    }

    /// Returns the next report of any vCPU.
    pub(crate) fn report(&self) -> Report {
        receive("a vCPU reports", &self.vcpus.reports).unwrap_or_else(|what| panic!("{what}"))
    }

    pub(crate) fn wait_for(&self, vcpu: u64, field: u64, value: u64) {
        wait_eq(&format!("mailbox field {field:#x}"), &value, || self.mailbox(vcpu, field));
    }

    pub(crate) fn mailbox(&self, vcpu: u64, field: u64) -> u64 {
        self.load(mailbox_gpa(vcpu) + field)
    }

    pub(crate) fn state(&self, vcpu: u64) -> State {
        State::from_number(self.mailbox(vcpu, offset::STATE)).expect("a state")
    }

    pub(crate) fn status(&self, vcpu: u64) -> Status {
        Status::from_number(self.mailbox(vcpu, offset::STATUS)).expect("a status")
    }

    pub(crate) fn result(&self, vcpu: u64) -> [u64; 4] {
        [0, 1, 2, 3].map(|index| self.mailbox(vcpu, offset::RESULT + index * 8))
    }

    pub(crate) fn words(&self, start: u64, pages: u64) -> Vec<u64> {
        (start..start + pages * PAGE_SIZE).step_by(8).map(|gpa| self.load(gpa)).collect()
    }

    pub(crate) fn load(&self, gpa: u64) -> u64 {
        self.memory.word(gpa).load(Ordering::Acquire)
    }

    pub(crate) fn store(&self, gpa: u64, value: u64) {
        self.memory.word(gpa).store(value, Ordering::Release);
    }
}

/// Guest RAM in one reservation: from 0 to the PCI gap, and the rest from 4 GiB on.
struct Memory {
    base: *mut u8,
    size: u64,
}

impl Memory {
    fn new(size: u64) -> Result<Self, Error> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping where the kernel likes.
        let base = unsafe { libc::mmap(ptr::null_mut(), size as usize, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            Err(io::Error::last_os_error().into())
        } else {
            Ok(Self { base: base.cast(), size })
        }
    }

    /// Returns guest-physical address, offset in the reservation, size.
    fn ranges(&self) -> Vec<(u64, u64, u64)> {
        let low = self.size.min(GAP_START);
        let mut ranges = vec![(0, 0, low), (GAP_END, low, self.size - low)];
        ranges.retain(|range| range.2 > 0);
        ranges
    }

    fn word(&self, gpa: u64) -> &AtomicU64 {
        let at = self.at(gpa, 8).cast();
        assert!(gpa.is_multiple_of(8), "{gpa:#x} is not the address of a word");
        // SAFETY: `at` checked the bounds, the mapping lives as long as `self`, and the guest's
        // accesses are single words.
        unsafe { AtomicU64::from_ptr(at) }
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        let to = self.at(gpa, bytes.len() as u64);
        // SAFETY: `at` checked the bounds, and no vCPU runs while the guest is loaded.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    fn at(&self, gpa: u64, length: u64) -> *mut u8 {
        let (start, offset, _) = self
            .ranges()
            .into_iter()
            .find(|(start, _, size)| gpa >= *start && gpa - start + length <= *size)
            .unwrap_or_else(|| panic!("{gpa:#x} is not in RAM"));
        self.base.wrapping_add((offset + gpa - start) as usize)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this struct's, and no vCPU is left, see the order of Vm's fields.
        unsafe { libc::munmap(self.base.cast(), self.size as usize) };
    }
}

/// The vCPUs' threads; they end when this is dropped, whatever their guests do.
struct VcpuThreads {
    reports: Receiver<Result<Report, String>>,
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl VcpuThreads {
    fn start(vcpus: Vec<VcpuFd>) -> Self {
        static KICK_HANDLER: Once = Once::new();
        KICK_HANDLER.call_once(|| {
            extern "C" fn interrupt_the_system_call(_: libc::c_int) {}
            let handler = interrupt_the_system_call as extern "C" fn(libc::c_int);
            // SAFETY: the handler does nothing, which is safe in any signal handler.
            unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        });
        let (sender, reports) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..)
            .zip(vcpus)
            .map(|(index, vcpu)| {
                let (sender, stop) = (sender.clone(), stop.clone());
                thread::spawn(move || run_vcpu(index, vcpu, &sender, &stop))
            })
            .collect();
        Self { reports, threads, stop }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        // Pairs with the load in run_vcpu.
        self.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // Again and again: a signal just before KVM_RUN is lost.
            while !thread.is_finished() {
                // SAFETY: the handle is not joined yet, so the thread's id is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
                thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }
}

fn run_vcpu(index: u64, mut vcpu: VcpuFd, reports: &Sender<Result<Report, String>>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let message = match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, data)) => data
                .try_into()
                .ok()
                .and_then(|bytes| Report::decode(u32::from_le_bytes(bytes)))
                .ok_or_else(|| format!("vCPU {index} reports {data:?}")),
            // Without an irqchip only: a local APIC that is not there, and a halt that nothing can
            // end.
            Ok(VcpuExit::MmioWrite(APIC..APIC_END, _)) => continue,
            Ok(VcpuExit::MmioRead(APIC..APIC_END, data)) => {
                data.fill(0);
                continue;
            }
            Ok(VcpuExit::Hlt) => return,
            Ok(exit) => Err(format!("vCPU {index} exits by {exit:?}")),
            // The second: a vCPU that was just started.
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => continue,
            Err(error) => Err(format!("vCPU {index} does not run: {error}")),
        };
        let failed = message.is_err();
        if reports.send(message).is_err() || failed {
            return;
        }
    }
}

struct Entries {
    pvh: u64,
    linux: u64,
}

/// Loads the ELF image and finds its entries.
fn load(memory: &Memory) -> Entries {
    const PT_LOAD: u64 = 1;
    const PT_NOTE: u64 = 4;
    assert_eq!(BARE_ELF[..6], *b"\x7fELF\x02\x01");
    let (table, entry_size, count) = (elf(32, 8), elf(54, 2), elf(56, 2));
    let mut pvh = None;
    for header in (0..count).map(|index| table + index * entry_size) {
        let (offset, address, size) = (elf(header + 8, 8) as usize, elf(header + 24, 8), elf(header + 32, 8) as usize);
        let bytes = &BARE_ELF[offset..offset + size];
        match elf(header, 4) {
            PT_LOAD => memory.write(address, bytes),
            PT_NOTE if bytes.starts_with(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0") => {
                pvh = Some(elf(offset as u64 + 16, 4));
            }
            _ => {}
        }
    }
    Entries { pvh: pvh.expect("the image has a PVH note"), linux: elf(24, 8) }
}

/// A little-endian number in the image.
fn elf(offset: u64, size: usize) -> u64 {
    BARE_ELF[offset as usize..][..size].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn write_boot_info(memory: &Memory, entry: Entry) {
    const START_MAGIC: u32 = 0x336e_c578;
    const RAM: u32 = 1;
    const RESERVED: u32 = 2;
    let mut map = vec![(0, 0x9_fc00, RAM), (0x9_fc00, 0x6_0400, RESERVED)];
    map.extend(memory.ranges().into_iter().map(|(gpa, _, size)| match gpa {
        0 => (0x10_0000, size - 0x10_0000, RAM),
        gpa => (gpa, size, RAM),
    }));
    let count = map.len() as u32;
    let entries = map.into_iter().map(|(gpa, size, kind): (u64, u64, u32)| {
        [&gpa.to_le_bytes()[..], &size.to_le_bytes(), &kind.to_le_bytes()].concat()
    });
    match entry {
        Entry::Pvh => {
            for (gpa, bytes) in (MEMORY_MAP..).step_by(24).zip(entries) {
                memory.write(gpa, &bytes);
            }
            memory.write(BOOT_INFO, &[START_MAGIC.to_le_bytes(), 1u32.to_le_bytes()].concat());
            memory.write(BOOT_INFO + 40, &MEMORY_MAP.to_le_bytes());
            memory.write(BOOT_INFO + 48, &count.to_le_bytes());
        }
        Entry::Linux => {
            memory.write(BOOT_INFO + 0x1e8, &[count as u8]);
            memory.write(BOOT_INFO + 0x2d0, &entries.flatten().collect::<Vec<_>>());
        }
    }
}

fn with_apic_id(mut cpuid: CpuId, id: u32) -> CpuId {
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0xb => entry.edx = id,
            0x8000_001e => entry.eax = id,
            _ => {}
        }
    }
    cpuid
}

fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment { limit: !0, selector, type_: kind, present: 1, db: 1, s: 1, g: 1, ..Default::default() }
}

fn enter_protected_mode(vcpu: &VcpuFd, entry: u64) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs, sregs.cr0) = (segment(0x08, 0xb), 1);
    (sregs.ds, sregs.es, sregs.ss) = (segment(0x10, 3), segment(0x10, 3), segment(0x10, 3));
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rbx: BOOT_INFO, rflags: 2, ..Default::default() })?;
    Ok(())
}

fn enter_long_mode(vcpu: &VcpuFd, memory: &Memory, entry: u64) -> Result<(), Error> {
    memory.word(LOADER_TABLES).store(LOADER_TABLES + 0x1003, Ordering::Relaxed);
    memory.word(LOADER_TABLES + 0x1000).store(LOADER_TABLES + 0x2003, Ordering::Relaxed);
    for index in 0..512 {
        memory.word(LOADER_TABLES + 0x2000 + index * 8).store(index << 21 | 0x83, Ordering::Relaxed);
    }
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = kvm_segment { db: 0, l: 1, ..segment(0x10, 0xb) };
    (sregs.ds, sregs.es, sregs.ss) = (segment(0x18, 3), segment(0x18, 3), segment(0x18, 3));
    sregs.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0001, LOADER_TABLES, 0x20, 0x500);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: entry, rsi: BOOT_INFO, rflags: 2, ..Default::default() })?;
    Ok(())
}
