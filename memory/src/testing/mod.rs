//! Faults, deliberate breaks and schedules. A build without tests has only the names of the
//! failpoints, at no cost.

#[cfg(test)]
pub(crate) mod busy;
pub(crate) mod failpoint;
pub(crate) mod sabotage;
#[cfg(all(test, shuttle))]
mod schedules;
