//! How the process that gave an image away knows that it is in use: by the ends of a pipe.
//!
//! The giver keeps the reading end and the image. Every process that uses a layer of it holds the
//! writing end, and passes it on with the layer. The kernel counts the descriptors, across
//! processes and whatever way they end: when the last has gone, the reading end says so, and the
//! image is dropped. Nothing is ever written to it.

use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::vm::fork::ForkImage;

/// How long the thread waits for the next lease.
const IDLE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// The images that this process has given away and that are in use. Each is held until no other
/// process uses it, also when every handle to this list has gone.
#[derive(Clone, Debug, Default)]
pub struct Leases(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    given: Vec<Given>,
    /// Images that are not in use any more, and are being dropped.
    dropping: usize,
    /// Wakes the thread that watches. There is one as long as something is given away.
    wake: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Given {
    /// Hung up when the last writing end has gone.
    end: Arc<PipeReader>,
    #[expect(dead_code, reason = "held, not read")]
    image: Arc<ForkImage>,
}

impl Leases {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many images are in use by other processes. One that is not any more counts until what it
    /// has of the VM's disks is closed: a commit comes next, and is refused to a disk that is shared.
    #[must_use]
    pub fn count(&self) -> usize {
        let state = self.state();
        state.given.len() + state.dropping
    }

    /// Holds `image` until the result, and every copy of that descriptor in any process, is closed.
    pub(super) fn lease(&self, image: &Arc<ForkImage>) -> io::Result<OwnedFd> {
        let (end, lease) = io::pipe()?;
        let mut state = self.state();
        let given = Given { end: Arc::new(end), image: Arc::clone(image) };
        if let Some(wake) = &state.wake {
            // The thread polls the new one too. The counter is far from full.
            rustix::io::write(wake, &1u64.to_ne_bytes())?;
            state.given.push(given);
        } else {
            let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
            let (leases, woken) = (self.clone(), Arc::clone(&wake));
            // It begins with the lock, so it finds what is given.
            thread::Builder::new().name("clade-leases".to_owned()).spawn(move || leases.watch(&woken))?;
            state.wake = Some(wake);
            state.given.push(given);
        }
        Ok(lease.into())
    }

    /// Drops what is not in use any more, until there has been nothing for [`IDLE`].
    fn watch(&self, wake: &OwnedFd) {
        let mut idle = false;
        while let Some(ends) = self.ends(idle) {
            let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(wake, PollFlags::IN)];
            // Nothing is asked for: that the other end has gone is always reported, and what another
            // process writes is nothing to us.
            polled.extend(ends.iter().map(|end| PollFd::new(&**end, PollFlags::empty())));
            // The next fork is spared the start of another thread.
            let limit = ends.is_empty().then_some(IDLE);
            match poll(&mut polled, limit.as_ref()) {
                Ok(ready) => idle = ready == 0,
                Err(Errno::INTR) => {}
                Err(error) => {
                    // What is given away is held to the end of the process.
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
            // Empty, or not to be read: then it is polled once more.
            let _ = rustix::io::read(wake, &mut [0; 8]);
            // Not under the lock: dropping an image may free memory and close disks.
            let taken = self.take(&gone);
            let count = taken.len();
            drop(taken);
            self.state().dropping -= count;
        }
    }

    /// The ends to be watched. `None` if there is none and it was `idle`: then the thread ends, and
    /// the next lease starts another.
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
