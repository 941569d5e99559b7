//! Images that are made here, pulled into a store: good ones, and a corpus of bad ones.

#![allow(clippy::unwrap_used)]

mod build;
mod credentials;
mod layout;
mod malicious;
mod sources;
mod whole;
