//! The pages of a file that have memory.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{SeekFrom, seek};

use crate::units::{PAGE_SHIFT, PAGE_SIZE, PageRange, push_run};

/// The pages of a file within `range` for which memory is allocated.
pub(crate) fn allocated(file: BorrowedFd<'_>, range: PageRange) -> io::Result<Vec<PageRange>> {
    let mut runs = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let data = match seek(file, SeekFrom::Data(at << PAGE_SHIFT)) {
            Ok(offset) => offset >> PAGE_SHIFT,
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data << PAGE_SHIFT))?.div_ceil(PAGE_SIZE);
        push_run(&mut runs, PageRange::new(data, hole).intersect(range));
        at = hole.max(at + 1);
    }
    Ok(runs)
}
