//! VMs under a real KVM: interrupts across forks, refused states, the serial port.

mod serial;
mod start;
mod storm;
mod suspend;
mod transfer;
