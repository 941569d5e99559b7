//! A prepared VM: the parts of a VM that do not depend on its guest, made off the path of a fork
//! (D6).

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use clade_devices::Irq;
use clade_devices::virtio::EventFds;
use clade_devices::virtio::regs::QUEUE_NOTIFY;
use clade_host_io::thread::serves_guest;
use clade_memory::{GuestRam, Store};
use kvm_ioctls::{IoEventAddress, VmFd};
use vm_memory::{Address, GuestMemoryRegion};

use crate::kvm::{CpuConfig, CpuTemplate, Host, NewVcpu, StateLayout, local_apics_alone, set_machine_check_banks};
use crate::platform::{EVENT_GSI, KVM_TSS, virtio_slot};
use crate::vm::config::{ConfigError, Irqchip, VmConfig};
use crate::vm::devices::DeviceError;
use crate::vm::error::VmError;
use crate::vm::stop::StopReason;
use crate::vm::vcpu::control::VcpuControl;
use crate::vm::vcpu::{Control, VcpuThread};

/// vCPU threads need little stack: they handle exits and state. A larger default would waste
/// address space in a thousand VMs.
const STACK: usize = 256 << 10;

/// VM, memslots, interrupt controllers, vCPUs and their threads. Memory is reserved, but none is
/// mapped.
#[derive(Debug)]
pub(crate) struct PreparedVm {
    // Dropped in this order: threads (with their vCPUs) in Drop, then the VM, then the memory its
    // slots point at.
    threads: Vec<JoinHandle<()>>,
    pub(crate) control: Arc<Control>,
    pub(crate) fd: Arc<VmFd>,
    pub(crate) ram: GuestRam,
    /// The irqfd and ioeventfds of each virtio device, connected.
    pub(crate) event_fds: Vec<EventFds>,
    /// The interrupt of ACPI events, if the guest has ACPI.
    pub(crate) events: Option<Arc<Irq>>,
}

impl PreparedVm {
    pub(crate) fn new(
        host: &Arc<Host>,
        layout: &Arc<StateLayout>,
        store: &Store,
        config: &VmConfig,
    ) -> Result<Self, VmError> {
        let ram = GuestRam::reserve(config.layout(), store)?;
        // Before KVM knows the memory: mapping over existing mappings would make KVM walk each
        // memslot.
        ram.vacate();
        let fd = host.create_vm().map_err(|e| VmError::kvm("create a VM", e))?;
        // Outside RAM, below 4 GiB. Intel hosts need it before the first vCPU.
        fd.set_tss_address(KVM_TSS.0 as usize).map_err(|e| VmError::kvm("set the TSS address", e))?;
        // Before the irqchip and the vCPUs: each memslot set after them waits 7-11 ms for a grace
        // period.
        for (slot, region) in (0u32..).zip(ram.regions()) {
            let memory = kvm_bindings::kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.host_address(),
            };
            // SAFETY: the addresses are reserved for as long as `ram` lives, which outlives `fd`
            // (field order). Before there is memory, and no vCPU runs, they may be vacant; when
            // there is, they are guest memory and nothing else.
            unsafe { fd.set_user_memory_region(memory) }.map_err(|e| VmError::kvm("set a memslot", e))?;
        }
        match config.irqchip {
            Irqchip::Full => {
                fd.create_irq_chip().map_err(|e| VmError::kvm("create the interrupt controllers", e))?;
                if config.pit {
                    let pit = kvm_bindings::kvm_pit_config::default();
                    fd.create_pit2(pit).map_err(|e| VmError::kvm("create the PIT", e))?;
                }
            }
            Irqchip::Split => {
                local_apics_alone(&fd).map_err(|e| VmError::kvm("enable local APICs alone", e))?;
            }
        }
        let event_fds = connect_event_fds(&fd, config)?;
        let events = config.has_acpi().then(|| wire_events(&fd)).transpose()?;
        let layout = match config.pmu {
            false => Arc::clone(layout),
            true => Arc::new(StateLayout::with_pmu(host, true)?),
        };
        let layout = match config.cpu {
            CpuTemplate::Host => layout,
            template => Arc::new(layout.of(template)?),
        };
        if !config.pmu {
            host.disable_pmu(&fd).map_err(|e| VmError::kvm("take performance counters away", e))?;
        }
        let control = Arc::new(VcpuControl::new(usize::from(config.cpus())));
        let mut prepared = Self { threads: Vec::new(), control, fd: Arc::new(fd), ram, event_fds, events };
        for index in 0..config.cpus() {
            let vcpu = prepared.fd.create_vcpu(u64::from(index)).map_err(|e| VmError::kvm("create a vCPU", e))?;
            set_machine_check_banks(&vcpu);
            let cpu_config = CpuConfig { hide: &config.hide, template: config.cpu, pmu: config.pmu };
            let cpuid = host.cpuid_of(index, config.cpus(), &cpu_config)?;
            vcpu.set_cpuid2(&cpuid).map_err(|e| VmError::kvm("set a vCPU's CPUID", e))?;
            let new = NewVcpu::read(&vcpu)?;
            let thread = VcpuThread {
                index: usize::from(index),
                host: Arc::clone(host),
                layout: Arc::clone(&layout),
                control: Arc::clone(&prepared.control),
                vm: Arc::clone(&prepared.fd),
                vcpu,
                cpuid,
                memory: prepared.ram.memory().clone(),
                page_fault_entry: None,
                new: Some(new),
                tsc_khz: None,
                is_starting: false,
            };
            let spawned = thread::Builder::new()
                .name(format!("clade-vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || {
                    serves_guest();
                    thread.main();
                })
                .map_err(VmError::Thread)?;
            prepared.threads.push(spawned);
        }
        prepared.control.wait_idle()?;
        Ok(prepared)
    }
}

/// Connects the interrupt and the notifications of each virtio device. Done here and not when the
/// device is made, because it depends on the configuration alone, and each ioeventfd waits for
/// readers of KVM's bus.
fn connect_event_fds(fd: &VmFd, config: &VmConfig) -> Result<Vec<EventFds>, VmError> {
    let mut all = Vec::new();
    for (at, queues) in config.virtio_queues().enumerate() {
        let (base, gsi) = virtio_slot(at).ok_or(ConfigError::Devices { devices: config.virtio_queues().count() })?;
        let event_fds = EventFds::new(queues).map_err(DeviceError::Io)?;
        let notify = IoEventAddress::Mmio(base.0 + QUEUE_NOTIFY);
        for (queue, event) in (0u32..).zip(&event_fds.notify) {
            // Matches the queue's number: one event per queue, at the same register.
            fd.register_ioevent(event, &notify, queue)
                .map_err(|e| VmError::kvm("connect a device's notifications", e))?;
        }
        // Without an IOAPIC there is no GSI to raise.
        if config.irqchip == Irqchip::Full {
            fd.register_irqfd(event_fds.irq.eventfd(), gsi)
                .map_err(|e| VmError::kvm("connect a device's interrupt", e))?;
        }
        all.push(event_fds);
    }
    Ok(all)
}

fn wire_events(fd: &VmFd) -> Result<Arc<Irq>, VmError> {
    let irq = Irq::new().map_err(DeviceError::Io)?;
    fd.register_irqfd(irq.eventfd(), EVENT_GSI).map_err(|e| VmError::kvm("connect the interrupt of events", e))?;
    Ok(Arc::new(irq))
}

impl Drop for PreparedVm {
    fn drop(&mut self) {
        self.control.stop(StopReason::Requested);
        for thread in self.threads.drain(..) {
            // A panic was turned into a stop reason on the thread itself.
            let _ = thread.join();
        }
    }
}
