//! The `clade` command as a person or a program meets it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod agent;
mod api;
mod bad_input;
mod check;
mod control;
mod disk;
mod ending;
mod guest;
mod labels;
mod many;
mod metrics;
mod notify;
mod pages;
mod snapshot;
mod storm;
mod stress;
mod supervisor;
mod tool;
mod ttl;
mod way_in;
mod worker;
