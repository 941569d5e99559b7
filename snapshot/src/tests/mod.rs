//! Tests of the whole, by kind of fault.

mod basic;
mod chains;
mod damage;
mod dependents;
pub(crate) mod faults;
mod fixture;
mod history;
mod hostile;
mod kill;
pub(crate) mod support;
mod swap;
mod walk;
