//! System calls. All of the crate's unsafe code is in here and in [`crate::region`]'s accessor.

mod extents;
mod mapping;
mod pagemap;
mod sigbus;
mod tmpfs;
mod uffd;
mod window;

pub(crate) use extents::allocated;
pub(crate) use mapping::Reservation;
pub(crate) use pagemap::Pagemap;
pub(crate) use sigbus::SigbusWatch;
pub use tmpfs::HugeTmpfs;
pub(crate) use tmpfs::small_file;
pub(crate) use uffd::{Fault, RegisterMode, Uffd, UffdOpenError};
pub(crate) use window::FileWindow;
