//! The calls of the services `process.Process` and `filesystem.Filesystem`, and the host's for layers.

mod filesystem;
mod layer;
mod process;
mod watch;
