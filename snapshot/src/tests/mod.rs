//! Tests of the whole, by kind of fault.

mod basic;
pub(crate) mod faults;
pub(crate) mod support;
