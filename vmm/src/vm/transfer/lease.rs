//! Tracks whether an image given to other processes is still in use, by the ends of a pipe.
//!
//! The giver keeps the reading end and the image. Every process that uses a layer of it holds the
//! writing end, and passes it on with the layer. The kernel counts the descriptors across
//! processes, for any way in which these end: when the last descriptor is closed, the reading end
//! is hung up, and the image is dropped. No data is ever written to the pipe.

use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::vm::fork::ForkImage;

/// How long the thread waits for the next lease.
const IDLE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The images that this process has given away and that are in use. An image is held until no other
/// process uses it, even if every handle to this list is gone.
#[derive(Clone, Debug, Default)]
pub struct Leases(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    given: Vec<Given>,
    /// Number of images that were ever given away.
    made: u64,
    /// Number of images that are no longer in use, and are being dropped.
    dropping: usize,
    /// Wakes the watching thread, which runs as long as an image is given away.
    wake: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Given {
    /// Hung up when the last writing end has gone.
    end: Arc<PipeReader>,
    image: Arc<ForkImage>,
    number: u64,
}

impl Leases {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of images in use by other processes. An unused image counts until its files of
    /// the VM's disks are closed: a commit comes next, and is refused for a shared disk.
    #[must_use]
    pub fn count(&self) -> usize {
        let state = self.state();
        state.given.len() + state.dropping
    }

    /// Returns the image that this process has given away under `number`, if another process still uses
    /// it.
    #[must_use]
    pub fn image(&self, number: u64) -> Option<Arc<ForkImage>> {
        self.state().given.iter().find(|given| given.number == number).map(|given| Arc::clone(&given.image))
    }

    /// Holds `image` until the result, and every copy of that descriptor in any process, is closed.
    /// Returns the image's number too, which is never 0.
    pub(super) fn lease(&self, image: &Arc<ForkImage>) -> io::Result<(OwnedFd, u64)> {
        let (end, lease) = io::pipe()?;
        let mut state = self.state();
        state.made += 1;
        let number = state.made;
        let given = Given { end: Arc::new(end), image: Arc::clone(image), number };
        if let Some(wake) = &state.wake {
            // The thread polls the new one too. The counter is far from full.
            rustix::io::write(wake, &1u64.to_ne_bytes())?;
            state.given.push(given);
        } else {
            let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            let (leases, woken) = (self.clone(), Arc::clone(&wake));
            // The thread begins by taking the lock, so it finds the given images.
            thread::Builder::new().name("clade-leases".to_owned()).spawn(move || leases.watch(&woken))?;
            state.wake = Some(wake);
            state.given.push(given);
        }
        Ok((lease.into(), number))
    }

    /// Drops unused images. Returns after [`IDLE`] without any image.
    fn watch(&self, wake: &OwnedFd) {
        let mut idle = false;
        while let Some(ends) = self.ends(idle) {
            let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(wake, PollFlags::IN)];
            // No events are requested: a hangup is always reported, and data from another process
            // is ignored.
            polled.extend(ends.iter().map(|end| PollFd::new(&**end, PollFlags::empty())));
            // Spares the next fork the start of another thread.
            let limit = ends.is_empty().then_some(IDLE);
            match poll(&mut polled, limit.as_ref()) {
                Ok(ready) => idle = ready == 0,
                Err(Errno::INTR) => {}
                Err(error) => {
                    // Given images are held until the process ends.
                    tracing::error!(%error, "the leases of images cannot be watched");
                    self.state().wake = None;
                    return;
                }
            }
            let mut gone = Vec::new();
            for (end, fd) in ends.iter().zip(&polled[1..]) {
                if fd.revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                    gone.push(Arc::clone(end));
                }
            }
            // Empty, or unreadable: it is then polled once more.
            let _ = rustix::io::read(wake, &mut [0; 8]);
            // Not under the lock: dropping an image may free memory and close disks.
            let taken = self.take(&gone);
            let count = taken.len();
            drop(taken);
            self.state().dropping -= count;
        }
    }

    /// The ends to watch. `None` if no image is given away and the thread was `idle`: the thread
    /// then ends, and the next lease starts another.
    fn ends(&self, idle: bool) -> Option<Vec<Arc<PipeReader>>> {
        let mut state = self.state();
        if idle && state.given.is_empty() {
            state.wake = None;
            return None;
        }
        Some(state.given.iter().map(|given| Arc::clone(&given.end)).collect())
    }

    fn take(&self, gone: &[Arc<PipeReader>]) -> Vec<Given> {
        let is_gone = |given: &Given| gone.iter().any(|end| Arc::ptr_eq(end, &given.end));
        let mut state = self.state();
        let taken: Vec<Given> = state.given.extract_if(.., |given| is_gone(given)).collect();
        state.dropping += taken.len();
        taken
    }
}
