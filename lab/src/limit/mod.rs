//! The limits of the benches: figures of the unavoidable kernel calls alone.
//!
//! The guest is 15 bytes of code in ring 3. It writes or reads a word in some pages, reports through a
//! port, and spins. Its VM has one memslot (two from 3 GiB on), one vCPU, and neither interrupt controllers nor devices. Its
//! RAM is a private mapping of a file. A vCPU's state is its general and its special registers.
//!
//! A limit is measured in the same run as the figure beside it. Other limits are baselines of their benches: a
//! mutex without contention, the file written past the page cache, a guest that is not disturbed.

mod processes;
mod spinning;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap};

pub(crate) use processes::{main as processes_main, measure as measure_processes};
pub(crate) use spinning::{EitherWay, Spinning};

/// Bytes of a page.
const PAGE: usize = 4096;
/// Addresses of the guest's page tables: 4 GiB, mapped one to one in pages of 2 MiB. The last ones are adjacent.
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
/// The address of the first page that the guest touches.
const DATA: u64 = 2 << 20;
/// The least RAM of a guest.
const LEAST: u64 = 64 << 20;
/// RAM from here on stands from 4 GiB on, out of the guest's reach: KVM has pages of its own below.
const REACHED: u64 = 3 << 30;
/// The image has contents up to here, and holes from here on.
const FILLED: u64 = 1 << 30;
/// The port of the report.
const PORT: u16 = 0x10;
/// Where KVM may keep its three-page TSS.
const TSS: usize = 0xfffb_d000;

/// An access of the guest to each page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Touch {
    Write,
    Read,
}

impl Touch {
    /// The address of the guest's code.
    const fn code_at(self) -> u64 {
        match self {
            Self::Write => 0x1_0000,
            Self::Read => 0x1_1000,
        }
    }

    /// `mov`; `add rbx, rdx`; `dec rcx`; `jnz` back; `out PORT, al`; `jmp .`
    const fn code(self) -> [u8; 15] {
        let [op, register] = match self {
            // mov [rbx], rcx
            Self::Write => [0x89, 0x0b],
            // mov rax, [rbx]
            Self::Read => [0x8b, 0x03],
        };
        [0x48, op, register, 0x48, 0x01, 0xd3, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0xe6, PORT as u8, 0xeb, 0xfe]
    }
}

/// Pages that the guest touches, from `DATA` on, each `step` pages after the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    pub(crate) count: u64,
    pub(crate) step: u64,
}

impl Pages {
    /// The page that a first instruction writes.
    const ONE: Self = Self { count: 1, step: 1 };

    fn addresses(self) -> impl Iterator<Item = u64> {
        (0..self.count).map(move |page| DATA + page * self.step * PAGE as u64)
    }
}

/// Whether a run of a guest has ended with its report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ran {
    Reported,
    Interrupted,
}

/// Addresses for RAM, each used once. Above those that `clade_memory` takes; the kernel gives mappings without an
/// address higher ones.
static VACANT: AtomicUsize = AtomicUsize::new(0x6000_0000_0000);

/// A mapping of this process.
#[derive(Debug)]
struct Mapping {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value, wherever that goes.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps private anonymous memory.
    fn anonymous(bytes: usize) -> Result<Self> {
        // SAFETY: the kernel chooses an address that is free.
        let at = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        Self::of(at, bytes)
    }

    /// Maps a file privately at `at`, where nothing else is mapped.
    fn private(file: &File, bytes: usize, at: usize) -> Result<Self> {
        // SAFETY: the mapping replaces no other one.
        let at = unsafe {
            mmap(
                std::ptr::with_exposed_provenance_mut(at),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE,
                file,
                0,
            )
        }?;
        Self::of(at, bytes)
    }

    fn of(at: *mut std::ffi::c_void, bytes: usize) -> Result<Self> {
        Ok(Self { at: NonNull::new(at.cast()).context("mmap returned no address")?, bytes })
    }

    /// The address of a page, if it is in the mapping.
    fn page(&self, at: u64) -> Result<NonNull<u8>> {
        let at = usize::try_from(at)?;
        if at.checked_add(PAGE).is_none_or(|end| end > self.bytes) {
            bail!("{at:#x} is outside of {:#x} bytes", self.bytes);
        }
        // SAFETY: the address is in the mapping, by the check above.
        Ok(unsafe { self.at.add(at) })
    }

    fn copy_page(&self, at: u64, to: &mut [u8]) -> Result<()> {
        let (page, to) = (self.page(at)?, to.first_chunk_mut::<PAGE>().context("less than a page")?);
        // SAFETY: the page is in the mapping and `to` has as many bytes. The guest, which may write them, is parked.
        unsafe { page.copy_to_nonoverlapping(NonNull::from(to).cast(), PAGE) };
        Ok(())
    }

    fn write_page(&self, at: u64, from: &[u8; PAGE]) -> Result<()> {
        // SAFETY: the page is in the mapping and `from` has as many bytes. The guest is parked.
        unsafe { self.page(at)?.copy_from_nonoverlapping(NonNull::from(from).cast(), PAGE) };
        Ok(())
    }

    /// Gives pages back: they have the file's contents again.
    fn discard(&self, at: u64, pages: u64) -> Result<()> {
        let bytes = usize::try_from(pages)? * PAGE;
        self.page(at + bytes as u64 - PAGE as u64)?;
        // SAFETY: the range is in the mapping, by the check of its last page. Pages are accessed by pointers only.
        unsafe { madvise(self.page(at)?.as_ptr().cast(), bytes, Advice::LinuxDontNeed) }?;
        Ok(())
    }

    fn protect(&self, flags: MprotectFlags) -> Result<()> {
        // SAFETY: the range is this mapping. The caller makes it writable before the next write.
        unsafe { mprotect(self.at.as_ptr().cast(), self.bytes, flags) }?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping, which ends here.
        let _ = unsafe { munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

/// KVM and an image, for the guests of the limits.
#[derive(Debug)]
pub(crate) struct Limits {
    kvm: Kvm,
    cpuid: CpuId,
    image: File,
    bytes: usize,
}

impl Limits {
    /// Opens KVM, with an image in memory for guests with this much RAM.
    pub(crate) fn new(ram: u64) -> Result<Self> {
        Self::of(ram, File::from(memfd_create("limit", MemfdFlags::CLOEXEC)?))
    }

    /// Opens KVM, with an image in this empty file.
    pub(crate) fn of(ram: u64, image: File) -> Result<Self> {
        // RAM out of the guest's reach only makes the mapping longer.
        let bytes = ram.max(LEAST);
        ftruncate(&image, bytes)?;
        let entry = |of: u64, flags: u64| (of | flags).to_le_bytes();
        image.write_all_at(&entry(TABLES[1], 0x67), TABLES[0])?;
        for table in 0..4 {
            image.write_all_at(&entry(TABLES[2] + table * PAGE as u64, 0x67), TABLES[1] + table * 8)?;
        }
        for block in 0..4 * 512 {
            // Present, writable, for ring 3, accessed, dirty, 2 MiB.
            image.write_all_at(&entry(block << 21, 0xe7), TABLES[2] + block * 8)?;
        }
        for touch in [Touch::Write, Touch::Read] {
            image.write_all_at(&touch.code(), touch.code_at())?;
        }
        // The pages that are touched have contents, as ours have.
        let data = vec![0x5a; 1 << 20];
        let mut at = DATA;
        while at < bytes.min(FILLED) {
            image.write_all_at(&data[..data.len().min((bytes - at) as usize)], at)?;
            at += data.len() as u64;
        }
        let kvm = Kvm::new()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        Ok(Self { kvm, cpuid, image, bytes: usize::try_from(bytes)? })
    }

    /// Makes a VM whose RAM is still empty.
    pub(crate) fn prepare(&self) -> Result<LimitVm> {
        self.prepare_by(&self.kvm)
    }

    fn prepare_by(&self, kvm: &Kvm) -> Result<LimitVm> {
        // The address is vacant: replacing a mapping would have KVM walk its own map of the slot.
        let at = VACANT.fetch_add(self.bytes + (1 << 30), Ordering::Relaxed);
        let vm = kvm.create_vm()?;
        vm.set_tss_address(TSS)?;
        let low = (self.bytes as u64).min(REACHED);
        let slots = [(0, 0, low, at as u64), (1, 4 << 30, self.bytes as u64 - low, at as u64 + low)];
        for (slot, guest_phys_addr, memory_size, userspace_addr) in slots.into_iter().filter(|slot| slot.2 > 0) {
            let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
            // SAFETY: only `LimitVm::map` maps memory there, and `LimitVm` keeps that until the VM is closed.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&self.cpuid)?;
        let sregs = in_ring_3(vcpu.get_sregs()?);
        Ok(LimitVm { vcpu, _vm: vm, at, bytes: self.bytes, ram: None, sregs })
    }

    /// Maps a VM's RAM, sets its registers, and runs it until its first report. Returns the time taken.
    pub(crate) fn first_instruction(&self, vm: &mut LimitVm) -> Result<Duration> {
        self.answer(vm, Touch::Write, 1)
    }

    /// The same, of a guest that touches `pages` pages before it reports.
    pub(crate) fn answer(&self, vm: &mut LimitVm, touch: Touch, pages: u64) -> Result<Duration> {
        let begun = Instant::now();
        vm.map(&self.image)?;
        vm.load(touch, Pages { count: pages, step: 1 })?;
        vm.run_to_report()?;
        Ok(begun.elapsed())
    }

    /// Makes a VM and runs it until its first report. Returns the time taken.
    pub(crate) fn cold(&self, touch: Touch, pages: u64) -> Result<Duration> {
        let begun = Instant::now();
        let mut vm = self.prepare()?;
        self.answer(&mut vm, touch, pages)?;
        // The VM ends outside of the time.
        Ok(begun.elapsed())
    }

    /// Runs a guest on a thread of its own.
    pub(crate) fn spinning(&self) -> Result<Spinning> {
        let mut vm = self.prepare()?;
        vm.map(&self.image)?;
        Spinning::start(vm, self.image.try_clone()?)
    }
}

/// Returns special registers of 64-bit code in ring 3, with these page tables.
fn in_ring_3(fresh: kvm_sregs) -> kvm_sregs {
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x33,
        type_: 11,
        present: 1,
        dpl: 3,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { type_: 3, selector: 0x2b, l: 0, db: 1, ..code };
    // PAE, OSFXSR and OSXMMEXCPT; paging and protection; long mode and SYSCALL.
    let (cr4, cr0, efer) = (0x620, 0x8005_0033, 0x501);
    kvm_sregs { cs: code, ds: data, es: data, fs: data, gs: data, ss: data, cr3: TABLES[0], cr4, cr0, efer, ..fresh }
}

/// A VM of the limits.
#[derive(Debug)]
pub(crate) struct LimitVm {
    vcpu: VcpuFd,
    _vm: VmFd,
    /// The address of its RAM.
    at: usize,
    bytes: usize,
    /// After the descriptors, which are closed first.
    ram: Option<Mapping>,
    sregs: kvm_sregs,
}

impl LimitVm {
    /// Maps its RAM, once.
    fn map(&mut self, image: &File) -> Result<()> {
        self.ram = Some(Mapping::private(image, self.bytes, self.at)?);
        Ok(())
    }

    fn ram(&self) -> Result<&Mapping> {
        self.ram.as_ref().context("the RAM is not mapped")
    }

    /// Sets the registers of a guest that is about to touch pages.
    fn load(&self, touch: Touch, pages: Pages) -> Result<()> {
        let last = pages.addresses().last().context("no page to touch")?;
        if last + PAGE as u64 > REACHED.min(self.bytes as u64) {
            bail!("{} pages of a step of {} are more than the guest's RAM", pages.count, pages.step);
        }
        self.vcpu.set_sregs(&self.sregs)?;
        self.vcpu.set_regs(&kvm_regs {
            rip: touch.code_at(),
            rbx: DATA,
            rcx: pages.count,
            rdx: pages.step * PAGE as u64,
            // Ports are open to ring 3.
            rflags: 0x3002,
            ..kvm_regs::default()
        })?;
        Ok(())
    }

    fn run(&mut self) -> Result<Ran> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => Ok(Ran::Reported),
            Ok(exit) => bail!("the guest has left with {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => Ok(Ran::Interrupted),
            Err(error) => Err(error.into()),
        }
    }

    fn run_to_report(&mut self) -> Result<()> {
        while self.run()? != Ran::Reported {}
        Ok(())
    }
}

/// Memory whose written 4 KiB pages are write-protected by one call: the least that a freeze does.
#[derive(Debug)]
pub(crate) struct Protected(Mapping);

impl Protected {
    pub(crate) fn new(pages: u64) -> Result<Self> {
        let memory = Mapping::anonymous(usize::try_from(pages)? * PAGE)?;
        // SAFETY: the range is the mapping. The advice changes no contents.
        unsafe { madvise(memory.at.as_ptr().cast(), memory.bytes, Advice::LinuxNoHugepage) }?;
        Ok(Self(memory))
    }

    /// Writes each page, and protects them. Returns the time of the latter.
    pub(crate) fn measure(&self) -> Result<Duration> {
        self.0.protect(MprotectFlags::READ | MprotectFlags::WRITE)?;
        let page = [0x5a; PAGE];
        for at in (0..self.0.bytes).step_by(PAGE) {
            self.0.write_page(at as u64, &page)?;
        }
        let begun = Instant::now();
        self.0.protect(MprotectFlags::READ)?;
        Ok(begun.elapsed())
    }
}

/// Whether KVM can be opened. Otherwise the test is skipped.
#[cfg(test)]
fn kvm() -> bool {
    Kvm::new().map_err(|error| clade_test_support::skip("kvm", &format!("/dev/kvm: {error}"))).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_touches_its_pages_and_reports() {
        if !kvm() {
            return;
        }
        let limits = Limits::new(LEAST).unwrap();
        let mut vm = limits.prepare().unwrap();
        limits.answer(&mut vm, Touch::Write, 3).unwrap();
        let word = |at| {
            let mut page = [0; PAGE];
            vm.ram().unwrap().copy_page(at, &mut page).unwrap();
            u64::from_le_bytes(page[..8].try_into().unwrap())
        };
        // The loop's counter, and the file's contents beyond it.
        let words: Vec<_> = (0..4).map(|page| word(DATA + page * PAGE as u64)).collect();
        assert_eq!(words, [3, 2, 1, 0x5a5a_5a5a_5a5a_5a5a]);
        // In the private mapping only.
        let mut in_file = [0; 8];
        limits.image.read_exact_at(&mut in_file, DATA).unwrap();
        assert_eq!(in_file, [0x5a; 8]);
        vm.load(Touch::Write, Pages { count: 1 << 20, step: 1 }).unwrap_err();
        limits.cold(Touch::Read, 16).unwrap();
    }
}
