//! Operations of the host on the devices of a running VM.

use clade_devices::virtio::balloon::{Balloon, BalloonStats};
use clade_devices::virtio::net::{Egress, EgressError, EgressRule, Link, Net, NetStats};
use clade_devices::virtio::vsock::GuestNotice;
use clade_devices::{Console, DOORBELL};
use clade_memory::PAGE_SHIFT;

use crate::kvm::messages;
use crate::vm::devices::DeviceError;
use crate::vm::error::VmError;
use crate::vm::identity::{ChildIdentity, Endpoints, Identity};
use crate::vm::machine::Vm;

const MIB_SHIFT: u32 = 20;
impl Vm {
    /// The VM's interfaces, addresses and sockets, which no other VM has.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Takes the interfaces, addresses and sockets of a child called `name` before its image
    /// exists, which keeps the time for that out of the fork.
    ///
    /// # Errors
    /// When one cannot be taken. Then none is taken, and this VM runs on (I13).
    pub fn child_endpoints(&self, name: &str, choice: &ChildIdentity) -> Result<Endpoints, VmError> {
        Ok(Endpoints::child(self.config(), &self.identity, name, choice)?)
    }

    /// Sets the target of the balloon to `mib` MiB. The guest gives up that much memory when it
    /// can, or not at all.
    ///
    /// # Errors
    /// When there is no balloon, or `mib` is not less than the VM's memory.
    pub fn set_balloon(&self, mib: u64) -> Result<(), VmError> {
        let there = self.config().layout().bytes() >> MIB_SHIFT;
        let pages = u32::try_from(mib << (MIB_SHIFT - PAGE_SHIFT)).ok().filter(|_| mib < there);
        let pages = pages.ok_or(VmError::Balloon { asked: mib, there })?;
        let set = self.devices.with_sync_device(0, |device| {
            let set = device.with(|balloon: &mut Balloon| balloon.set_target(pages));
            device.config_changed();
            set
        });
        set.flatten().ok_or(VmError::NoDevice { device: "balloon" })
    }

    /// Requests memory statistics from the guest. Its answer is in [`Vm::balloon_stats`] some time
    /// later.
    ///
    /// # Errors
    /// When there is no balloon.
    pub fn ask_balloon(&self) -> Result<(), VmError> {
        let asked = self.devices.with_sync_device(0, |device| device.with(Balloon::ask));
        asked.flatten().ok_or(VmError::NoDevice { device: "balloon" })
    }

    /// The balloon's size, and the newest statistics from the guest.
    ///
    /// # Errors
    /// When there is no balloon.
    pub fn balloon_stats(&self) -> Result<BalloonStats, VmError> {
        let stats = self.devices.with_sync_device(0, |device| device.with(|balloon: &mut Balloon| balloon.stats()));
        stats.flatten().ok_or(VmError::NoDevice { device: "balloon" })
    }

    /// What the guest has reported to its socket device. None without one.
    #[must_use]
    pub fn guest_notice(&self) -> Option<GuestNotice> {
        self.devices.guest_notice()
    }

    /// Checks the number of a vCPU.
    ///
    /// # Errors
    /// When there is no such vCPU.
    pub fn expect_vcpu(&self, vcpu: u64) -> Result<u8, VmError> {
        let cpus = self.config().cpus();
        u8::try_from(vcpu).ok().filter(|vcpu| *vcpu < cpus).ok_or(VmError::NoVcpu { vcpu, cpus })
    }

    /// Interrupts a vCPU with the vector [`DOORBELL`]: the bare guest halts while its mailbox is
    /// empty. A paused VM takes the interrupt when it runs, and an image or a snapshot of it has
    /// the interrupt pending.
    ///
    /// # Errors
    /// When there is no such vCPU, the VM has stopped, or KVM refuses the message.
    pub fn ring_doorbell(&self, vcpu: u64) -> Result<(), VmError> {
        let vcpu = self.expect_vcpu(vcpu)?;
        // The guest must run to take the interrupt. A reset or fork at the same time would restore
        // or save the interrupt controllers.
        let _one = self.awake()?;
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        messages::interrupt(&self.prepared.fd, vcpu, DOORBELL).map_err(|error| VmError::kvm("interrupt a vCPU", error))
    }

    /// Presses the power button. A guest that handles it shuts down in an orderly way and powers
    /// itself off ([`StopReason::PowerOff`](crate::vm::StopReason::PowerOff)). The press belongs to
    /// this VM alone: children and snapshots do not have it, and a reset forgets it. The guest's
    /// reaction is part of the guest's state, and is inherited.
    ///
    /// # Errors
    /// When the VM has no ACPI, is paused, or has stopped.
    pub fn press_power_button(&self) -> Result<(), VmError> {
        // The guest must run to notice the press. No reset or fork may run at the same time.
        let _one = self.awake()?;
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        if !self.config.has_acpi() {
            return Err(VmError::NoDevice { device: "power button" });
        }
        if self.is_paused() {
            return Err(VmError::Paused);
        }
        self.devices.press_power_button();
        Ok(())
    }

    /// Whether the guest's kernel has noticed the last press of the power button.
    #[must_use]
    pub fn power_button_noticed(&self) -> bool {
        self.devices.power_button_noticed()
    }

    /// Packets and bytes of network device number `index`. None without such a device.
    #[must_use]
    pub fn net_stats(&self, index: usize) -> Option<NetStats> {
        self.devices.with_sync_device(index, |device| device.with(|net: &mut Net| net.stats())).flatten()
    }

    /// Whether network device number `index` lets packets pass. None without such a device.
    #[must_use]
    pub fn network(&self, index: usize) -> Option<Link> {
        self.devices.with_sync_device(index, |device| device.with(|net: &mut Net| net.link())).flatten()
    }

    /// Opens or closes all network devices. When this returns with [`Link::Closed`], no packet
    /// passes any more. An open link comes up after the guest has seen it down.
    ///
    /// # Errors
    /// When there is no network device, or the VM has stopped.
    pub fn set_network(&self, link: Link) -> Result<(), VmError> {
        // A fork in between would have children with one device open and one closed.
        let _one = self.operations.take();
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        if self.config().nets.is_empty() {
            return Err(VmError::NoDevice { device: "network device" });
        }
        for at in 0..self.config().nets.len() {
            let _there = self.devices.with_sync_device(at, |device| {
                if device.with(|net: &mut Net| net.set_link(link)) == Some(true) {
                    device.config_changed();
                    device.wake();
                }
            });
        }
        Ok(())
    }

    /// The number of packets decided by each egress rule of network device number `index`, by
    /// layers. None without such a device.
    #[must_use]
    pub fn egress_packets(&self, index: usize) -> Option<Vec<Vec<(EgressRule, u64)>>> {
        self.devices.with_sync_device(index, |device| device.with(|net: &mut Net| net.egress_packets())).flatten()
    }

    /// The number of layers in the policy of network device number `index` that came from its
    /// parent. None without such a device.
    #[must_use]
    pub fn inherited_egress(&self, index: usize) -> Option<usize> {
        self.devices.with_sync_device(index, |device| device.with(|net: &mut Net| net.inherited_egress())).flatten()
    }

    /// Replaces the egress rules of all network devices. When this returns, packets that the rules
    /// drop are no longer sent.
    ///
    /// # Errors
    /// As for [`Vm::set_network`].
    pub fn set_egress(&self, egress: &Egress) -> Result<(), VmError> {
        self.change_egress(|_| Ok(egress.clone()))
    }

    /// The same, except for the first `kept` layers of each device's policy: these stay, and
    /// `rules` replace the later ones.
    ///
    /// # Errors
    /// As for [`Vm::set_network`], and when a policy would have too many rules. Then no policy is
    /// changed.
    pub fn replace_egress(&self, kept: usize, rules: &[EgressRule]) -> Result<(), VmError> {
        self.change_egress(|policy| policy.replaced(kept, rules))
    }

    fn change_egress(&self, change: impl Fn(&Egress) -> Result<Egress, EgressError>) -> Result<(), VmError> {
        // As for `set_network`.
        let _one = self.operations.take();
        if let Some(reason) = self.stopped() {
            return Err(VmError::Stopped(reason));
        }
        if self.config().nets.is_empty() {
            return Err(VmError::NoDevice { device: "network device" });
        }
        let mut changed = Vec::new();
        for at in 0..self.config().nets.len() {
            let policy = self.devices.with_sync_device(at, |device| device.with(|net: &mut Net| net.egress().clone()));
            // Without a policy, as after a driver's error, there are no packets to judge.
            changed.push(change(&policy.flatten().unwrap_or_default()).map_err(DeviceError::from)?);
        }
        for (at, policy) in changed.into_iter().enumerate() {
            let _there = self.devices.with_sync_device(at, |device| {
                device.with(|net: &mut Net| net.set_egress(policy));
            });
        }
        Ok(())
    }

    /// The output of the virtio console, if there is one.
    #[must_use]
    pub fn virtio_console(&self) -> Option<&Console> {
        self.devices.hvc.as_ref().map(|hvc| &hvc.output)
    }

    /// Types into the virtio console. Returns the number of bytes accepted: 0 without such a
    /// console.
    pub fn type_in_virtio(&self, bytes: &[u8]) -> usize {
        self.devices.hvc.as_ref().map_or(0, |hvc| hvc.typist.type_in(bytes))
    }
}
