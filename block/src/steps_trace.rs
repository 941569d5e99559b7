//! Hooks for tests: the order of changes to files, and failures after any step.

#[cfg(not(test))]
pub(super) use real::{request, step};
#[cfg(test)]
pub(super) use testing::{request, step};

#[cfg(not(test))]
mod real {
    /// Called before each change of a file or a directory that bypasses the engine.
    pub(crate) fn step(_what: impl FnOnce() -> String) -> std::io::Result<()> {
        Ok(())
    }

    /// Called with each request to the engine.
    pub(crate) fn request(request: clade_host_io::Request) -> clade_host_io::Request {
        request
    }
}

#[cfg(test)]
pub(super) mod testing {
    use std::cell::RefCell;
    use std::fs::File;
    use std::io;
    use std::sync::Arc;

    use clade_host_io::{CachePolicy, IoFile, Request};

    #[derive(Default)]
    struct Trace {
        done: Vec<String>,
        /// Number of steps that may still be done. All later steps fail, as if the process had
        /// ended.
        left: Option<usize>,
        /// The name of files whose syncs fail.
        unsyncable: Option<String>,
    }

    thread_local! {
        static TRACE: RefCell<Trace> = RefCell::default();
    }

    pub(crate) fn step(what: impl FnOnce() -> String) -> io::Result<()> {
        TRACE.with_borrow_mut(|trace| {
            match &mut trace.left {
                Some(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
                Some(left) => *left -= 1,
                None => {}
            }
            trace.done.push(what());
            Ok(())
        })
    }

    /// Runs `work`, with only the first `steps` steps succeeding. Returns the steps done as well.
    pub(crate) fn traced<T>(steps: Option<usize>, work: impl FnOnce() -> T) -> (T, Vec<String>) {
        TRACE.with_borrow_mut(|trace| (trace.done, trace.left) = (Vec::new(), steps));
        let result = work();
        (result, TRACE.with_borrow_mut(|trace| (std::mem::take(&mut trace.done), trace.left = None).0))
    }

    /// Makes syncs of files with this name fail from now on.
    pub(crate) fn fail_syncs_of(name: Option<&str>) {
        TRACE.with_borrow_mut(|trace| trace.unsyncable = name.map(str::to_owned));
    }

    /// Records a sync, or makes it fail.
    pub(crate) fn request(request: Request) -> Request {
        let Request::Sync { file, all } = request else { return request };
        let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        TRACE.with_borrow_mut(|trace| {
            let fails = trace.unsyncable.as_deref() == Some(name.as_str());
            trace.done.push(format!("engine: sync {name}"));
            if !fails {
                return Request::Sync { file, all };
            }
            // A sync of /dev/null fails with EINVAL.
            let null = IoFile::read_only(File::open("/dev/null").unwrap(), file.path(), CachePolicy::Host);
            Request::Sync { file: Arc::new(null), all }
        })
    }
}
