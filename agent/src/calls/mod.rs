//! The calls of the services `process.Process` and `filesystem.Filesystem`.

mod filesystem;
mod process;
mod watch;
