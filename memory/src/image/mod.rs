//! Images from and for others: layers built of data, of files and of other processes' memory, and
//! copies of images.

pub(crate) mod builder;
pub(crate) mod detach;
