//! VMs under a real KVM: interrupts across forks, states that are refused, the serial port.

mod serial;
mod start;
mod storm;
