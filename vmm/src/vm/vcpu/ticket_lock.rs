//! One operation on a VM at a time, first come first served.
//!
//! A plain mutex is unfair: the thread that has just unlocked it is the quickest to lock it again.
//! A thread that pauses and resumes a VM in a loop would keep a fork waiting without limit.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Tickets {
    /// The next ticket to be drawn.
    next: u64,
    /// The ticket that has the lock.
    now: u64,
}

/// A fair lock. See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct TicketLock {
    tickets: Mutex<Tickets>,
    called: Condvar,
}

/// The lock, held until this is dropped.
#[derive(Debug)]
pub(crate) struct TicketGuard<'a>(&'a TicketLock);

impl Tickets {
    /// Draws the next ticket.
    fn draw(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }
}

impl TicketLock {
    fn tickets(&self) -> MutexGuard<'_, Tickets> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until every thread that drew a ticket earlier has unlocked.
    pub(crate) fn take(&self) -> TicketGuard<'_> {
        let own = self.tickets().draw();
        self.wait_called(own)
    }

    /// Waits until ticket `own` has the lock.
    fn wait_called(&self, own: u64) -> TicketGuard<'_> {
        let mut tickets = self.tickets();
        while tickets.now != own {
            tickets = self.called.wait(tickets).unwrap_or_else(PoisonError::into_inner);
        }
        TicketGuard(self)
    }
}

impl Drop for TicketGuard<'_> {
    fn drop(&mut self) {
        self.0.tickets().now += 1;
        // Wakes all waiters: each compares its own ticket.
        self.0.called.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_asks_again_and_again_starves_nobody() {
        let (turns, done, others) = (TicketLock::default(), AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            // Releases its turn only to take the next.
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let _turn = turns.take();
                    others.fetch_add(1, Ordering::SeqCst);
                    thread::sleep(Duration::from_micros(200));
                }
            });
            // Counted in turns, so that the time either thread needs for one does not matter.
            let mut rounds = 0;
            while rounds < 100 || others.load(Ordering::SeqCst) <= 10 {
                let mut held = turns.tickets();
                // No turn begins or ends while the tickets are held.
                let (before, ahead) = (others.load(Ordering::SeqCst), held.next - held.now);
                let own = held.draw();
                drop(held);
                let turn = turns.wait_called(own);
                let between = others.load(Ordering::SeqCst) - before;
                drop(turn);
                if ahead > 1 || between as u64 > ahead {
                    done.store(true, Ordering::SeqCst);
                    panic!("{between} turns of the other's before ours, {ahead} were drawn");
                }
                rounds += 1;
                thread::sleep(Duration::from_micros(100));
            }
            done.store(true, Ordering::SeqCst);
        });
    }

    #[test]
    fn turns_come_in_the_order_they_are_asked_for() {
        let (turns, order) = (TicketLock::default(), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            let first = turns.take();
            for n in 0..8u64 {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.take();
                    order.lock().unwrap().push(n);
                });
                while turns.tickets().next != n + 2 {
                    thread::yield_now();
                }
            }
            drop(first);
        });
        assert_eq!(order.into_inner().unwrap(), (0..8).collect::<Vec<_>>());
    }
}
