//! Connects guests to listeners on the host, for workers that may open no sockets.
//!
//! One thread runs an [`EventManager`] whose subscriber owns all guests' sockets.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use clade_devices::virtio::vsock::answer_broker;
use clade_host_io::seqpacket;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use rustix::fs::{Mode, OFlags, fstat};
use vmm_sys_util::eventfd::EventFd;

/// Requests handled together.
const BATCH: usize = 64;

/// A guest whose connections are made here.
#[derive(Debug)]
struct BrokeredGuest {
    device: OwnedFd,
    /// The socket of its device, beside which the host's listeners are.
    socket: PathBuf,
    /// That socket's file. Another VM may have the path once the file is removed.
    file: OwnedFd,
}

impl BrokeredGuest {
    /// Answers one request. Connecting does not block.
    ///
    /// # Errors
    /// When the guest's process has ended, or sends another request; when the socket's file is removed: a process may
    /// live on after its VM, while the next VM at that path has other listeners.
    fn answer(&self) -> io::Result<()> {
        if fstat(&self.file)?.st_nlink == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        answer_broker(&self.device, &self.socket)
    }
}

/// Orders for the broker's thread.
#[derive(Debug, Default)]
struct Orders {
    guests: Vec<BrokeredGuest>,
    end: bool,
}

#[derive(Debug)]
struct BrokerShared {
    orders: Mutex<Orders>,
    /// Readable if there are orders.
    ordered: EventFd,
}

impl BrokerShared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guests, by their devices' sockets.
#[derive(Debug)]
struct BrokeredGuests {
    shared: Arc<BrokerShared>,
    by_fd: HashMap<RawFd, BrokeredGuest>,
    has_ended: bool,
}

impl BrokeredGuests {
    /// Watches the sockets of new guests.
    fn take_orders(&mut self, ops: &mut EventOps<'_>) {
        // Fails only if there is nothing to read. Read first: a later order is noticed again.
        let _ = self.shared.ordered.read();
        let Orders { guests, end } = std::mem::take(&mut *self.shared.orders());
        self.has_ended |= end;
        for guest in guests {
            let fd = guest.device.as_raw_fd();
            match ops.add(Events::new_raw(fd, EventSet::IN)) {
                Ok(()) => drop(self.by_fd.insert(fd, guest)),
                // Its socket is closed, so the guest's connections fail.
                Err(error) => tracing::warn!(%error, socket = %guest.socket.display(), "a guest is not connected"),
            }
        }
    }

    /// Answers one request. Connecting does not block: if a listener's backlog is full, the device
    /// asks again.
    fn answer(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(guest) = self.by_fd.get(&fd) else { return };
        if let Err(error) = guest.answer()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::debug!(%error, socket = %guest.socket.display(), "a guest is not connected any more");
            // Before the socket is closed: a new guest's may get its number.
            if let Err(error) = ops.remove(Events::empty_raw(fd)) {
                tracing::warn!(%error, "a socket is still watched");
            }
            self.by_fd.remove(&fd);
        }
    }
}

impl MutEventSubscriber for BrokeredGuests {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.shared.ordered.as_raw_fd() {
            self.take_orders(ops);
        } else {
            self.answer(events.fd(), ops);
        }
    }

    /// [`Broker::start`] registers the first descriptor, and reports the error.
    fn init(&mut self, _: &mut EventOps<'_>) {}
}

/// Serves guests until the end is ordered.
fn serve(events: &mut EventManager<BrokeredGuests>, guests: SubscriberId) {
    // The subscriber is never removed.
    while events.subscriber_mut(guests).is_ok_and(|guests| !guests.has_ended) {
        if let Err(error) = events.run() {
            tracing::error!(%error, "guests are not connected to the host any more");
            return;
        }
    }
}

/// One thread that connects all guests. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Broker(Arc<BrokerShared>);

impl Broker {
    /// # Errors
    /// When no thread or descriptor is left.
    pub(super) fn start() -> io::Result<Self> {
        let ordered = clade_host_io::eventfd()?;
        let shared = Arc::new(BrokerShared { orders: Mutex::default(), ordered });
        let mut events = EventManager::new_with_capacity(BATCH).map_err(io::Error::other)?;
        let guests = BrokeredGuests { shared: Arc::clone(&shared), by_fd: HashMap::new(), has_ended: false };
        let guests = events.add_subscriber(guests);
        let watched = events.event_ops(guests).and_then(|mut ops| ops.add(Events::new(&shared.ordered, EventSet::IN)));
        watched.map_err(io::Error::other)?;
        thread::Builder::new().name("clade-broker".to_owned()).spawn(move || serve(&mut events, guests))?;
        Ok(Self(shared))
    }

    /// Returns the device's end of a socket, for a device whose own is at `socket`. The broker's
    /// thread watches the other end soon after. If it cannot, the guest's connections are refused, as they are once the
    /// file of that socket is removed.
    ///
    /// # Errors
    /// When there is no such file, or no descriptor is left.
    pub(super) fn connect(&self, socket: PathBuf) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(&socket, flags, Mode::empty())?;
        let (device, theirs) = seqpacket::pair()?;
        rustix::io::ioctl_fionbio(&device, true)?;
        self.0.orders().guests.push(BrokeredGuest { device, socket, file });
        self.notify();
        Ok(theirs)
    }

    fn notify(&self) {
        // Its counter has room.
        let _ = self.0.ordered.write(1);
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.0.orders().end = true;
        self.notify();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use clade_test_support::wait_until;

    use super::*;

    /// Asks for a connection to a port of the host. `None` if the broker has closed the socket.
    fn ask(device: impl AsFd, port: u32) -> Option<seqpacket::Message> {
        seqpacket::send(&device, &port.to_le_bytes(), &[]).ok()?;
        seqpacket::receive(&device, 4).ok()
    }

    #[test]
    fn a_process_that_outlives_its_vm_reaches_no_listener_of_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("web.vsock");
        let listener = |path: &Path| UnixListener::bind(path).unwrap();
        let broker = Broker::start().unwrap();
        assert!(broker.connect(socket.clone()).is_err(), "a VM without a socket");
        let own = listener(&socket);
        let port = listener(&dir.path().join("web.vsock_6000"));
        let (ended, other) = (broker.connect(socket.clone()).unwrap(), broker.connect(socket.clone()).unwrap());
        wait_until("a connection", || ask(&ended, 6000).is_some_and(|answer| answer.files.len() == 1));
        port.accept().unwrap();
        // The next VM has the path, and its host's listener is there.
        std::fs::remove_file(&socket).unwrap();
        drop(own);
        let _next = listener(&socket);
        let next = broker.connect(socket.clone()).unwrap();
        for gone in [&ended, &other] {
            assert!(ask(gone, 6000).is_none());
        }
        wait_until("a connection of the next VM", || ask(&next, 6000).is_some_and(|answer| answer.files.len() == 1));
        port.accept().unwrap();
        port.set_nonblocking(true).unwrap();
        assert!(port.accept().is_err(), "no other has come");
    }
}
