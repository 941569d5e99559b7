//! How the process that gave an image away knows that it is in use: by the ends of a pipe.
//!
//! The giver keeps the reading end and the image. Every process that uses a layer of it holds the
//! writing end, and passes it on with the layer. The kernel counts the descriptors, across
//! processes and whatever way they end: when the last has gone, the reading end says so, and the
//! image is dropped. Nothing is ever written to it.

use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::vm::fork::ForkImage;

/// The images that this process has given away and that are in use. They are held until no other
/// process uses them.
#[derive(Clone, Debug, Default)]
pub struct Leases(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    given: Vec<Given>,
    /// Wakes the thread that watches. There is one as long as something is given away.
    wake: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Given {
    /// Readable, with nothing to read, when the last writing end has gone.
    end: Arc<PipeReader>,
    #[expect(dead_code, reason = "held, not read")]
    image: Arc<ForkImage>,
}

impl Leases {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many images are in use by other processes.
    #[must_use]
    pub fn count(&self) -> usize {
        self.state().given.len()
    }

    /// Holds `image` until the result, and every copy of that descriptor in any process, is closed.
    pub(super) fn lease(&self, image: &Arc<ForkImage>) -> io::Result<OwnedFd> {
        let (end, lease) = io::pipe()?;
        let mut state = self.state();
        let wake = match &state.wake {
            Some(wake) => Arc::clone(wake),
            None => self.watch(&mut state)?,
        };
        state.given.push(Given { end: Arc::new(end), image: Arc::clone(image) });
        drop(state);
        // The thread polls the new one too. Nobody writes as often as would fill the counter.
        let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
        Ok(lease.into())
    }

    fn watch(&self, state: &mut State) -> io::Result<Arc<OwnedFd>> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        // It keeps the leases alive no longer than whoever gives images away.
        let (leases, woken) = (Arc::downgrade(&self.0), Arc::clone(&wake));
        thread::Builder::new().name("clade-leases".to_owned()).spawn(move || watch(&leases, &woken))?;
        state.wake = Some(Arc::clone(&wake));
        Ok(wake)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The thread finds that there is nothing left to watch.
        if let Some(wake) = &self.state.get_mut().unwrap_or_else(PoisonError::into_inner).wake {
            let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
        }
    }
}

fn watch(leases: &Weak<Inner>, wake: &OwnedFd) {
    loop {
        let Some(ends) = leases.upgrade().map(|inner| Leases(inner).ends()) else { return };
        let mut polled: Vec<PollFd<'_>> = vec![PollFd::new(wake, PollFlags::IN)];
        polled.extend(ends.iter().map(|end| PollFd::new(&**end, PollFlags::IN)));
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                // Without it images are held for longer than they must be: to the end of the process.
                tracing::error!(%error, "the leases of images cannot be watched");
                return;
            }
        }
        let gone: Vec<Arc<PipeReader>> = ends
            .iter()
            .zip(&polled[1..])
            .filter(|(_, fd)| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
            .map(|(end, _)| Arc::clone(end))
            .collect();
        if !polled[0].revents().is_empty() {
            let mut count = [0; 8];
            let _ = rustix::io::read(wake, &mut count);
        }
        drop(polled);
        let Some(leases) = leases.upgrade().map(Leases) else { return };
        // Not under the lock: dropping an image may free memory and close disks.
        drop(leases.take(&gone));
    }
}

impl Leases {
    fn ends(&self) -> Vec<Arc<PipeReader>> {
        self.state().given.iter().map(|given| Arc::clone(&given.end)).collect()
    }

    fn take(&self, gone: &[Arc<PipeReader>]) -> Vec<Given> {
        let is_gone = |given: &Given| gone.iter().any(|end| Arc::ptr_eq(end, &given.end));
        self.state().given.extract_if(.., |given| is_gone(given)).collect()
    }
}
