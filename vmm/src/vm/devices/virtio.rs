//! Makes the virtio devices of one VM, fresh or from their saved states.

use std::sync::Arc;

use clade_block::Disk;
use clade_devices::Console;
use clade_devices::virtio::balloon::{Balloon, BalloonState};
use clade_devices::virtio::block::Block;
use clade_devices::virtio::console::{ConsoleDevice, Typist};
use clade_devices::virtio::net::{Net, NetOptions};
use clade_devices::virtio::rng::Rng;
use clade_devices::virtio::sync_device::SyncDevice;
use clade_devices::virtio::vsock::Vsock;
use clade_devices::virtio::{Backend, DeviceState as VirtioState, VirtioDevice, VirtioMmio};

use crate::vm::config::{DeviceSlot, VmConfig};
use crate::vm::devices::{DeviceError, DevicesState};
use crate::vm::identity::Endpoints;
use crate::vm::prepared::PreparedVm;

/// The virtio console's two ends on the host.
#[derive(Clone, Debug)]
pub(crate) struct Hvc {
    pub(crate) output: Console,
    pub(crate) typist: Typist,
}

/// All virtio devices by slot, and the console's ends on the host.
pub(crate) struct VirtioDevices {
    pub(crate) devices: Vec<Arc<VirtioMmio>>,
    pub(crate) hvc: Option<Hvc>,
}

/// Makes all devices of `config`. They take their interfaces and sockets from `ends`.
pub(crate) fn make(
    saved: Option<(&DevicesState, &[Backend])>,
    config: &VmConfig,
    prepared: &PreparedVm,
    ends: &mut Endpoints,
) -> Result<VirtioDevices, DeviceError> {
    let wanted = config.device_slots().count();
    if let Some((state, backends)) = saved {
        let found = state.virtio.len().min(backends.len());
        if found != wanted {
            return Err(DeviceError::Mismatch { found, wanted });
        }
    }
    // Interfaces are taken from the front, in the order of the devices' slots.
    let mut builder = VirtioBuilder { ends, next_net: 0, hvc: None };
    let mut devices = Vec::with_capacity(wanted);
    for (at, (slot, event_fds)) in config.device_slots().zip(&prepared.event_fds).enumerate() {
        let device = match saved {
            None => VirtioMmio::new(builder.device(slot, None)?, &prepared.ram, event_fds.clone(), true),
            Some((state, backends)) => {
                let state = &state.virtio[at];
                let device = builder.device(slot, Some((&state.device, &backends[at])))?;
                VirtioMmio::restore(device, &prepared.ram, event_fds.clone(), state)?
            }
        };
        devices.push(Arc::new(device));
    }
    Ok(VirtioDevices { devices, hvc: builder.hvc })
}

struct VirtioBuilder<'a> {
    ends: &'a mut Endpoints,
    next_net: usize,
    hvc: Option<Hvc>,
}

impl VirtioBuilder<'_> {
    fn device(
        &mut self,
        slot: DeviceSlot<'_>,
        saved: Option<(&VirtioState, &Backend)>,
    ) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        Ok(match (slot, saved) {
            (DeviceSlot::Disk(spec), None) => Box::new(Block::new(Disk::open(&spec.disk)?, &spec.device)),
            (DeviceSlot::Disk(spec), Some((VirtioState::Block(state), Backend::Disk(image)))) => {
                Box::new(Block::restore(state, image.open()?, &spec.device))
            }
            (DeviceSlot::Net(spec), saved @ (None | Some((VirtioState::Net(_), _)))) => {
                if self.ends.nets.is_empty() {
                    return Err(DeviceError::NoEnd { device: "network device", number: self.next_net });
                }
                self.next_net += 1;
                let end = self.ends.nets.remove(0);
                let state = match saved {
                    Some((VirtioState::Net(state), _)) => Some(state),
                    _ => None,
                };
                let egress = state.map_or(&spec.egress, |state| &state.egress).narrowed(&self.ends.egress)?;
                let (link, egress) = (self.ends.network, Some(egress));
                let options = NetOptions { mac: end.mac, link, egress, receive: spec.receive, send: spec.send };
                // A VM that starts from a saved state has another address than the one known to its
                // guest.
                let net = Net::new(end.backend, &options, state, state.is_some()).map_err(DeviceError::Io)?;
                Box::new(SyncDevice::new(net))
            }
            (DeviceSlot::Vsock, None | Some((VirtioState::Vsock(_), _))) => {
                let end = self.ends.vsock.take();
                let end = end.ok_or(DeviceError::NoEnd { device: "socket device", number: 0 })?;
                Box::new(SyncDevice::new(Vsock::new(end.socket, end.reset).map_err(DeviceError::Io)?))
            }
            (DeviceSlot::Rng(limits), None | Some((VirtioState::Rng(_), _))) => {
                Box::new(SyncDevice::new(Rng::new(limits)))
            }
            (DeviceSlot::Balloon, None) => {
                Box::new(SyncDevice::new(Balloon::new(&BalloonState::default()).map_err(DeviceError::Io)?))
            }
            (DeviceSlot::Balloon, Some((VirtioState::Balloon(state), _))) => {
                Box::new(SyncDevice::new(Balloon::new(state).map_err(DeviceError::Io)?))
            }
            (DeviceSlot::Console, None | Some((VirtioState::Console(_), _))) => {
                let output = Console::default();
                let device = ConsoleDevice::new(output.clone()).map_err(DeviceError::Io)?;
                self.hvc = Some(Hvc { output, typist: device.typist() });
                Box::new(SyncDevice::new(device))
            }
            // The state is of another kind of device.
            _ => return Err(DeviceError::Mismatch { found: 1, wanted: 1 }),
        })
    }
}
