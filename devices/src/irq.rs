//! An interrupt line: an eventfd that KVM turns into an interrupt.

use std::io;
use std::sync::Arc;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// An interrupt line. Clones raise the same one.
#[derive(Clone, Debug)]
pub struct Irq(Arc<EventFd>);

impl Irq {
    /// A line that is not connected yet.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new() -> io::Result<Self> {
        clade_host_io::eventfd().map(Arc::new).map(Self)
    }

    /// The eventfd, to connect to an interrupt controller.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
