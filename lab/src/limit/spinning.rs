//! A guest that spins on a thread of its own until a signal parks it. It rests between two measurements.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use clade_harness::Sample;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::{LimitVm, PAGE, Pages, Touch};

/// A signal that comes before the vCPU's thread is in the guest is lost, so it is sent again.
const AGAIN: Duration = Duration::from_millis(5);
/// A minute.
const MOST_KICKS: u32 = 12_000;
/// The guest spins for so long before it is parked.
const SPINS: Duration = Duration::from_millis(1);

/// An order to the vCPU's thread, for when the vCPU is parked.
/// Returns the time of its end. Its captures are freed later.
type Order = Box<dyn FnOnce(&mut LimitVm) -> Done + Send>;
type Done = Result<Instant>;

/// How pages get their old contents back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Back {
    /// One call for the whole range: its pages are the file's again.
    Discard,
    /// Copied, page by page.
    Copy,
}

/// Times of resets by each way.
#[derive(Debug, Default)]
pub(crate) struct EitherWay {
    discard: Sample,
    copy: Sample,
}

impl EitherWay {
    /// The faster way.
    pub(crate) fn best(&self) -> &Sample {
        if self.copy.spread().p50 < self.discard.spread().p50 { &self.copy } else { &self.discard }
    }
}

/// A guest on a thread of its own. A drop ends it.
#[derive(Debug)]
pub(crate) struct Spinning {
    /// Each message has the guest spin until the next order.
    spin: Option<Sender<()>>,
    orders: Option<Sender<Order>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
    image: File,
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Not the signal of `clade_vmm`.
fn signal() -> libc::c_int {
    SIGRTMIN() + 5
}

impl Spinning {
    pub(super) fn start(mut vm: LimitVm, image: File) -> Result<Self> {
        register_signal_handler(signal(), nothing)?;
        vm.load(Touch::Write, Pages::ONE)?;
        let ((spin, spins), (orders, taken), (ends, done)) = (channel(), channel::<Order>(), channel());
        let spin_until_parked = move |vm: &mut LimitVm| -> Done {
            loop {
                // After its report the guest spins until the signal.
                vm.run()?;
                match taken.try_recv() {
                    Ok(order) => return order(vm),
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) => bail!("nobody waits"),
                }
            }
        };
        let thread = thread::Builder::new().name("limit".to_owned()).spawn(move || {
            for () in spins {
                if ends.send(spin_until_parked(&mut vm)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { spin: Some(spin), orders: Some(orders), done, thread: Some(thread), image })
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread is joined later, so its handle is valid. The signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), signal()) };
        }
    }

    /// Parks the vCPU, and has its thread carry out an order. Returns the time from the signal to the order's end.
    fn parked(&self, order: impl FnOnce(&mut LimitVm) -> Done + Send + 'static) -> Result<Duration> {
        let ended = |_| anyhow!("the thread of the vCPU has ended");
        self.spin.as_ref().context("the guest has ended")?.send(()).map_err(ended)?;
        thread::sleep(SPINS);
        let orders = self.orders.as_ref().context("the guest has ended")?;
        orders.send(Box::new(order)).map_err(|_| anyhow!("the thread of the vCPU has ended"))?;
        let begun = Instant::now();
        for _ in 0..MOST_KICKS {
            self.kick();
            match self.done.recv_timeout(AGAIN) {
                Ok(end) => return Ok(end?.saturating_duration_since(begun)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the thread of the vCPU has ended"),
            }
        }
        bail!("the vCPU cannot be parked")
    }

    /// Parks the vCPU, saves its registers, and copies `pages` pages: the least of a pause.
    pub(crate) fn pause(&self, pages: u64) -> Result<Duration> {
        let mut copies = vec![1; usize::try_from(pages)? * PAGE];
        self.parked(move |vm| {
            vm.vcpu.get_regs()?;
            vm.vcpu.get_sregs()?;
            vm.vcpu.get_xsave()?;
            let addresses = Pages { count: pages, step: 1 }.addresses();
            addresses.zip(copies.chunks_mut(PAGE)).try_for_each(|(at, to)| vm.ram()?.copy_page(at, to))?;
            Ok(Instant::now())
        })
    }

    /// Has the guest touch pages. Returns once it has.
    pub(crate) fn touch(&self, touch: Touch, pages: Pages) -> Result<Duration> {
        self.parked(move |vm| {
            vm.load(touch, pages)?;
            vm.run_to_report()?;
            Ok(Instant::now())
        })
    }

    /// Has the guest write pages and resets it, by each way.
    pub(crate) fn reset(&self, pages: Pages, into: &mut EitherWay) -> Result<()> {
        into.discard.push_us(self.reset_by(pages, Back::Discard)?);
        into.copy.push_us(self.reset_by(pages, Back::Copy)?);
        Ok(())
    }

    /// Has the guest write pages. Then parks the vCPU, gives the pages their old contents, sets its registers, and
    /// runs it until its report. Returns the time since the signal.
    fn reset_by(&self, pages: Pages, back: Back) -> Result<Duration> {
        self.touch(Touch::Write, pages)?;
        let old = if back == Back::Copy { Some(self.old_pages(pages)?) } else { None };
        self.parked(move |vm| {
            match &old {
                None => vm.ram()?.discard(super::DATA, (pages.count - 1) * pages.step + 1)?,
                Some(old) => {
                    for (at, page) in pages.addresses().zip(old) {
                        vm.ram()?.write_page(at, page)?;
                    }
                }
            }
            vm.load(Touch::Write, Pages::ONE)?;
            vm.run_to_report()?;
            Ok(Instant::now())
        })
    }

    fn old_pages(&self, pages: Pages) -> Result<Vec<Box<[u8; PAGE]>>> {
        let page = |at| {
            let mut page = Box::new([0; PAGE]);
            self.image.read_exact_at(page.as_mut_slice(), at)?;
            Ok(page)
        };
        pages.addresses().map(page).collect()
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        // The guest rests, so its thread ends. A guest that could not be parked ends by the closed channel.
        drop((self.spin.take(), self.orders.take()));
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            self.kick();
            thread::sleep(Duration::from_micros(100));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, kvm};
    use super::*;

    #[test]
    fn a_reset_gives_pages_their_old_contents() {
        if !kvm() {
            return;
        }
        let guest = Limits::new(64 << 20).unwrap().spinning().unwrap();
        let words = |count, step| {
            let (to, read) = channel();
            guest
                .parked(move |vm| {
                    let mut page = [0; PAGE];
                    for at in (Pages { count, step }).addresses() {
                        vm.ram()?.copy_page(at, &mut page)?;
                        to.send(page[0])?;
                    }
                    Ok(Instant::now())
                })
                .unwrap();
            read.iter().collect::<Vec<_>>()
        };
        for (step, back) in [(1, Back::Discard), (1, Back::Copy), (3, Back::Discard), (3, Back::Copy)] {
            let pages = Pages { count: 4, step };
            guest.touch(Touch::Write, pages).unwrap();
            assert_eq!(words(4, step), [4, 3, 2, 1]);
            guest.reset_by(pages, back).unwrap();
            // The first one is written again, by the first instruction.
            assert_eq!(words(4, step), [1, 0x5a, 0x5a, 0x5a], "step {step}, {back:?}");
        }
        assert!(guest.pause(64).unwrap() > Duration::ZERO);
    }
}
