//! Connects guests to listeners on the host, for workers that may open no sockets.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use clade_devices::virtio::vsock::answer_broker;
use clade_host_io::seqpacket;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Requests handled together.
const BATCH: usize = 64;
/// The event that ends the thread.
const END: u64 = u64::MAX;

/// A guest whose connections are made here.
#[derive(Debug)]
struct BrokeredGuest {
    device: OwnedFd,
    /// The socket of its device, beside which the host's listeners are.
    socket: PathBuf,
}

#[derive(Debug)]
struct BrokerShared {
    epoll: Epoll,
    end: EventFd,
    guests: Mutex<HashMap<RawFd, BrokeredGuest>>,
}

/// One thread that connects all guests. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Broker(Arc<BrokerShared>);

impl BrokerShared {
    fn guests(&self) -> MutexGuard<'_, HashMap<RawFd, BrokeredGuest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut events = vec![EpollEvent::default(); BATCH];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "guests are not connected to the host any more");
                    return;
                }
                Ok(count) => count,
            };
            for event in &events[..count] {
                if event.data() == END {
                    return;
                }
                self.answer(event.data() as RawFd);
            }
        }
    }

    /// Answers one request. Connecting does not block: if a listener's backlog is full, the device
    /// asks again.
    fn answer(&self, fd: RawFd) {
        let mut guests = self.guests();
        let Some(guest) = guests.get(&fd) else { return };
        if let Err(error) = answer_broker(&guest.device, &guest.socket)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            // The guest has ended, or sent another request.
            tracing::debug!(%error, socket = %guest.socket.display(), "a guest is not connected any more");
            // Closing its socket removes it from epoll.
            guests.remove(&fd);
        }
    }
}

impl Broker {
    /// # Errors
    /// When no thread or descriptor is left.
    pub(super) fn start() -> io::Result<Self> {
        let (epoll, end) = (Epoll::new()?, EventFd::new(EFD_NONBLOCK)?);
        epoll.ctl(ControlOperation::Add, end.as_raw_fd(), EpollEvent::new(EventSet::IN, END))?;
        let shared = Arc::new(BrokerShared { epoll, end, guests: Mutex::default() });
        let serving = Arc::clone(&shared);
        thread::Builder::new().name("clade-broker".to_owned()).spawn(move || serving.serve())?;
        Ok(Self(shared))
    }

    /// Returns the device's end of a socket, for a device whose own is at `socket`.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(super) fn connect(&self, socket: PathBuf) -> io::Result<OwnedFd> {
        let (device, theirs) = seqpacket::pair()?;
        rustix::io::ioctl_fionbio(&device, true)?;
        let fd = device.as_raw_fd();
        self.0.guests().insert(fd, BrokeredGuest { device, socket });
        let watched = self.0.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64));
        if let Err(error) = watched {
            self.0.guests().remove(&fd);
            return Err(error);
        }
        Ok(theirs)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Its counter has room.
        let _ = self.0.end.write(1);
    }
}
