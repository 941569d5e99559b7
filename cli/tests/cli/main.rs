//! The `clade` command as people and programs see it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod abuse;
mod agent;
mod ahead;
mod api;
mod bad_input;
mod cached;
mod cgroup;
mod control;
mod detach;
mod disk;
mod e2b;
mod e2b_ports;
mod egress;
mod ending;
mod flight;
mod graceful;
mod guest;
mod image;
mod kept;
mod labels;
mod lifecycle;
mod machine;
mod memory;
mod metrics;
mod net_hook;
mod network;
mod notify;
mod page;
mod pages;
mod python;
mod registry;
mod rollback;
mod secrets;
mod session;
mod snapshot;
mod storm;
mod supervisor;
mod suspend;
mod template;
mod tenants;
mod tool;
mod ttl;
mod user_net;
mod way_in;
