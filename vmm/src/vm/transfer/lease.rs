//! Tracks whether an image given to other processes is still in use, by the ends of a pipe.
//!
//! The giver keeps the reading end and the image. Every process that uses a layer of it holds the
//! writing end, and passes it on with the layer. The kernel counts the descriptors across
//! processes, for any way in which these end: when the last descriptor is closed, the reading end
//! is hung up, and the image is dropped. No data is ever written to the pipe.

use std::collections::HashMap;
use std::io::{self, PipeReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::vm::fork::ForkImage;

/// How long the thread waits for the next lease, in milliseconds.
const IDLE: i32 = 1000;
/// Number of ends taken at a time.
const EVENTS: usize = 64;

/// The images that this process has given away and that are in use. An image is held until no other
/// process uses it, even if every handle to this list is gone.
#[derive(Clone, Debug, Default)]
pub struct Leases(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// By number.
    given: HashMap<u64, Given>,
    /// Number of images that were ever given away.
    made: u64,
    /// Number of images that are no longer in use, and are being dropped.
    dropping: usize,
    /// The ends of all given images. A thread waits for it as long as an image is given away.
    watched: Option<Arc<Epoll>>,
}

#[derive(Debug)]
struct Given {
    /// Hung up when the last writing end has gone.
    end: PipeReader,
    image: Arc<ForkImage>,
}

impl Given {
    /// Adds its end to `watched`, or removes it.
    fn control(&self, watched: &Epoll, operation: ControlOperation, number: u64) -> io::Result<()> {
        // No events are requested: a hangup is always reported, and data from another process is ignored.
        watched.ctl(operation, self.end.as_raw_fd(), EpollEvent::new(EventSet::empty(), number))
    }
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

    /// Returns whether a thread waits for the ends of images.
    #[cfg(test)]
    pub(in crate::vm) fn is_watched(&self) -> bool {
        self.state().watched.is_some()
    }

    /// Returns the image that this process has given away under `number`, if another process still uses
    /// it.
    #[must_use]
    pub fn image(&self, number: u64) -> Option<Arc<ForkImage>> {
        self.state().given.get(&number).map(|given| Arc::clone(&given.image))
    }

    /// Holds `image` until the result, and every copy of that descriptor in any process, is closed.
    /// Returns the image's number too, which is never 0.
    pub(super) fn lease(&self, image: &Arc<ForkImage>) -> io::Result<(OwnedFd, u64)> {
        let (end, lease) = io::pipe()?;
        let given = Given { end, image: Arc::clone(image) };
        let mut state = self.state();
        let watched = self.watched(&mut state)?;
        let number = state.made + 1;
        // The waiting thread is not woken for it: that would be in each fork.
        given.control(&watched, ControlOperation::Add, number)?;
        state.made = number;
        state.given.insert(number, given);
        Ok((lease.into(), number))
    }

    /// The set that a thread waits for, which is started if there is none.
    fn watched(&self, state: &mut State) -> io::Result<Arc<Epoll>> {
        if let Some(watched) = &state.watched {
            return Ok(Arc::clone(watched));
        }
        let watched = Arc::new(Epoll::new()?);
        // There are some if an earlier thread could not wait.
        for (number, given) in &state.given {
            given.control(&watched, ControlOperation::Add, *number)?;
        }
        let (leases, waited_for) = (self.clone(), Arc::clone(&watched));
        thread::Builder::new().name("clade-leases".to_owned()).spawn(move || leases.watch(&waited_for))?;
        state.watched = Some(Arc::clone(&watched));
        Ok(watched)
    }

    /// Drops unused images. Returns after [`IDLE`] without any image.
    fn watch(&self, watched: &Epoll) {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            // An image that is given away after the look is watched at once, and counts at the next look. The idle
            // time spares the next fork the start of another thread.
            let limit = if self.state().given.is_empty() { IDLE } else { -1 };
            let count = match watched.wait(limit, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Given images are held until the next one is given away, or the process ends.
                    tracing::error!(%error, "the leases of images cannot be watched");
                    self.state().watched = None;
                    return;
                }
            };
            if count == 0 {
                let mut state = self.state();
                if state.given.is_empty() {
                    // Under the lock: the next lease starts another thread.
                    state.watched = None;
                    return;
                }
                continue;
            }
            // Not dropped under the lock: that may free memory and close disks.
            let taken = self.take(watched, &events[..count]);
            let count = taken.len();
            drop(taken);
            self.state().dropping -= count;
        }
    }

    /// Removes the images whose ends were hung up.
    fn take(&self, watched: &Epoll, events: &[EpollEvent]) -> Vec<Given> {
        let mut state = self.state();
        let mut take = |event: &EpollEvent| {
            let given = state.given.remove(&event.data())?;
            if let Err(error) = given.control(watched, ControlOperation::Delete, event.data()) {
                tracing::debug!(%error, "the end of an image's lease");
            }
            Some(given)
        };
        let taken: Vec<Given> = events.iter().filter_map(&mut take).collect();
        state.dropping += taken.len();
        taken
    }
}
