//! Workers prepared ahead of requests: each has a VM of one configuration, without memory or state.
//!
//! The pool keeps as many as the last forks took, up to a limit, and none for a configuration
//! without a recent fork. For VMs from a snapshot one more is kept: it opens the snapshot the next
//! time.

use clade_snapshot::KnownDir;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::overlays::{OverlayDirs, OverlayUse};
use super::worker_resources::SandboxProfile;
use clade_api::DaemonError;
use clade_worker::zygote::Zygote;
use clade_worker::{VmTemplate, Worker, WorkerRequest, Workers};

/// After this time without a fork, no worker is kept for a configuration.
const IDLE: Duration = Duration::from_secs(60);
/// Workers made at a time. Meanwhile, requests for workers wait.
const STEP: usize = 8;
/// Longest time that requests that make VMs delay the preparation of further workers.
const MAX_BUSY: Duration = Duration::from_millis(50);
/// The pause after such a request: its answer is on its way.
const REST: Duration = Duration::from_millis(1);

#[derive(Debug)]
struct TemplatePool {
    template: VmTemplate,
    /// The directories of its snapshots at its start. Its workers may reach these alone, even if
    /// the paths change.
    saved: Vec<SnapshotDirId>,
    /// The overlay directories in its workers' grants.
    _overlays: OverlayUse,
    ready: Vec<Worker>,
    wanted: usize,
    /// Opens the snapshot the next time.
    opener: Option<Worker>,
    wants_opener: bool,
    used: Instant,
}

/// A directory's device and inode. None if it is missing.
type SnapshotDirId = Option<(u64, u64)>;

/// Returns the directories of the snapshots of VMs of `template`, as they are now.
fn saved_now(template: &VmTemplate) -> Vec<SnapshotDirId> {
    let id = |dir: &KnownDir| std::fs::metadata(&dir.path).ok().map(|found| (found.dev(), found.ino()));
    template.saved.iter().map(id).collect()
}

/// A worker that a pool lacks.
#[derive(Clone, Copy, Debug)]
enum Lack {
    Opener,
    Workers(usize),
}

impl TemplatePool {
    /// A pool without workers, which uses the directories `held`.
    fn new(template: &VmTemplate, saved: Vec<SnapshotDirId>, wanted: usize, held: OverlayUse) -> Self {
        Self {
            template: template.clone(),
            saved,
            _overlays: held,
            ready: Vec::new(),
            wanted,
            opener: None,
            wants_opener: false,
            used: Instant::now(),
        }
    }

    /// Ends the workers of pools, which takes time: not under the lock of the state.
    fn end(pools: Vec<Self>) {
        drop(Workers(pools.into_iter().flat_map(Self::workers).collect()));
    }

    fn workers(self) -> impl Iterator<Item = Worker> {
        self.ready.into_iter().chain(self.opener)
    }

    /// Returns the kind of worker to make next.
    fn lacks(&self) -> Option<Lack> {
        let short = self.wanted.saturating_sub(self.ready.len());
        if self.wants_opener && self.opener.is_none() {
            // The opener gets ready while the others are made.
            Some(Lack::Opener)
        } else {
            (short > 0).then(|| Lack::Workers(short.min(STEP)))
        }
    }
}

#[derive(Debug, Default)]
struct State {
    templates: Vec<TemplatePool>,
    /// Requests that make VMs, and the start of the first.
    busy: usize,
    busy_since: Option<Instant>,
    /// End of the last of them.
    idle_since: Option<Instant>,
    is_closed: bool,
}

impl State {
    /// Returns the pool for `template`, whose snapshots are in the directories `saved`. A pool
    /// whose workers may only reach a replaced snapshot is removed, and pushed to `old`: its
    /// workers take time to end.
    fn pool(
        &mut self,
        template: &VmTemplate,
        saved: &[SnapshotDirId],
        old: &mut Vec<TemplatePool>,
    ) -> Option<&mut TemplatePool> {
        old.extend(self.templates.extract_if(.., |pool| pool.saved != saved && pool.template.is_at_paths_of(template)));
        self.templates.iter_mut().find(|pool| pool.template == *template)
    }

    /// Returns how long preparation has to pause at `now`.
    fn rest(&self, now: Instant) -> Duration {
        let left = |since: Option<Instant>, limit: Duration| {
            since.map_or(Duration::ZERO, |since| limit.saturating_sub(now.saturating_duration_since(since)))
        };
        if self.busy > 0 { left(self.busy_since, MAX_BUSY) } else { left(self.idle_since, REST) }
    }
}

/// A request that makes VMs. Meanwhile no worker is prepared for the next.
#[derive(Debug)]
pub(super) struct LaunchInProgress(Arc<PoolShared>);

impl Drop for LaunchInProgress {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.busy -= 1;
        if state.busy == 0 {
            state.busy_since = None;
            state.idle_since = Some(Instant::now());
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

#[derive(Debug)]
struct PoolShared {
    state: Mutex<State>,
    changed: Condvar,
    zygote: Arc<Zygote>,
    sandbox: SandboxProfile,
    overlays: OverlayDirs,
    most: usize,
}

/// The pool.
#[derive(Debug)]
pub(super) struct Pool(Arc<PoolShared>);

impl PoolShared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes workers for VMs of `template`.
    fn make(&self, template: &VmTemplate, count: usize) -> Result<Vec<Worker>, DaemonError> {
        let workers = self.zygote.workers(count)?;
        let (confine, request) =
            (self.sandbox.of_child(template), WorkerRequest::Prepare(Box::new(template.config.clone())));
        for worker in &workers {
            worker.confine(confine.clone())?;
            worker.request(&request, &[])?;
        }
        workers.iter().try_for_each(Worker::ready)?;
        Ok(workers)
    }

    /// Makes a worker that opens the snapshot of VMs of `template`.
    fn make_opener(&self, template: &VmTemplate) -> Result<Worker, DaemonError> {
        let worker = self.zygote.workers(1)?.pop().ok_or(DaemonError::Ending)?;
        worker.confine(self.sandbox.of_opener(template))?;
        Ok(worker)
    }

    /// Holds the directories for the writes of disks of VMs of `template`. None if there is no place for
    /// them. Not under the lock of the state: the directories may be on any file system.
    fn hold(&self, template: &VmTemplate) -> Option<OverlayUse> {
        let held = self.overlays.hold(&template.written());
        held.inspect_err(|error| tracing::warn!(%error, "no workers are prepared")).ok()
    }

    /// Waits until a worker is lacking, and makes a few. Returns whether to go on.
    fn refill(&self) -> bool {
        let (template, saved, lack) = {
            let mut state = self.state();
            loop {
                if state.is_closed {
                    return false;
                }
                let idle = state.templates.extract_if(.., |pool| pool.used.elapsed() > IDLE).collect::<Vec<_>>();
                if !idle.is_empty() {
                    drop(state);
                    TemplatePool::end(idle);
                    return true;
                }
                let short = state.templates.iter().find_map(|pool| Some((pool, pool.lacks()?)));
                let pause = state.rest(Instant::now());
                let rest = match short {
                    Some((pool, lack)) if pause.is_zero() => {
                        break (pool.template.clone(), pool.saved.clone(), lack);
                    }
                    Some(_) => pause,
                    None => IDLE / 4,
                };
                let waited = self.changed.wait_timeout(state, rest);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        let made = match lack {
            Lack::Workers(count) => self.make(&template, count).map(|workers| self.put(&template, &saved, workers)),
            Lack::Opener => self.make_opener(&template).map(|worker| self.put_opener(&template, &saved, worker)),
        };
        if let Err(error) = made {
            tracing::warn!(%error, "no workers are prepared");
            // The next request has it tried again.
            if let Some(pool) = self.state().templates.iter_mut().find(|pool| pool.template == template) {
                (pool.wanted, pool.wants_opener) = (0, false);
            }
        }
        true
    }

    fn put(&self, template: &VmTemplate, saved: &[SnapshotDirId], workers: Vec<Worker>) {
        let mut held = self.hold(template);
        let mut surplus = Vec::new();
        let mut state = self.state();
        let is_closed = state.is_closed;
        let is_theirs = |pool: &&mut TemplatePool| pool.template == *template && pool.saved == saved;
        if is_closed {
            surplus = workers;
        } else if let Some(pool) = state.templates.iter_mut().find(is_theirs) {
            pool.ready.extend(workers);
        } else if let Some(held) = held.take() {
            let pool = TemplatePool::new(template, saved.to_vec(), workers.len(), held);
            state.templates.push(TemplatePool { ready: workers, ..pool });
        } else {
            surplus = workers;
        }
        // Not under the lock: workers take time to end.
        drop(state);
        drop(surplus);
    }

    fn put_opener(&self, template: &VmTemplate, saved: &[SnapshotDirId], worker: Worker) {
        let mut state = self.state();
        let wants =
            |pool: &&mut TemplatePool| pool.template == *template && pool.saved == saved && pool.opener.is_none();
        match state.templates.iter_mut().find(wants) {
            Some(pool) => pool.opener = Some(worker),
            None => {
                // Not under the lock: the worker takes time to end.
                drop(state);
                drop(worker);
            }
        }
    }
}

impl Pool {
    /// Starts a pool of at most `most` workers for a configuration, beside those prepared on
    /// request.
    ///
    /// # Errors
    /// When the thread that fills it cannot be started.
    pub(super) fn start(
        zygote: &Arc<Zygote>,
        sandbox: SandboxProfile,
        overlays: OverlayDirs,
        most: usize,
    ) -> Result<Self, DaemonError> {
        let (state, changed, zygote) = (Mutex::default(), Condvar::new(), Arc::clone(zygote));
        let shared = Arc::new(PoolShared { state, changed, zygote, sandbox, overlays, most });
        let weak: Weak<PoolShared> = Arc::downgrade(&shared);
        let fill = move || {
            while let Some(shared) = weak.upgrade() {
                if !shared.refill() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("clade-pool".to_owned())
            .spawn(fill)
            .map_err(|source| DaemonError::Worker { source })?;
        Ok(Self(shared))
    }

    /// Takes up to `count` workers for `template`, and has as many made for the next time, once the
    /// request is over.
    pub(super) fn take(&self, template: &VmTemplate, count: usize) -> (Vec<Worker>, LaunchInProgress) {
        // Not under the lock: the directories may be on any file system.
        let (saved, held, mut old) = (saved_now(template), self.0.hold(template), Vec::new());
        let mut state = self.0.state();
        state.busy += 1;
        state.busy_since.get_or_insert_with(Instant::now);
        let wanted = count.min(self.0.most);
        let taken = match state.pool(template, &saved, &mut old) {
            Some(pool) => {
                // The number falls by a quarter at a time, so that one small fork in between costs
                // little.
                pool.wanted = wanted.max((pool.wanted * 3 / 4).min(self.0.most));
                pool.used = Instant::now();
                let left = pool.ready.len().saturating_sub(count);
                pool.ready.split_off(left)
            }
            None => {
                state.templates.extend(held.map(|held| TemplatePool::new(template, saved, wanted, held)));
                Vec::new()
            }
        };
        drop(state);
        TemplatePool::end(old);
        (taken, LaunchInProgress(Arc::clone(&self.0)))
    }

    /// Takes the worker that opens the snapshot of VMs of `template`, if there is one, and has
    /// another made for the next time.
    pub(super) fn take_opener(&self, template: &VmTemplate) -> Option<Worker> {
        if self.0.most == 0 {
            return None;
        }
        let (saved, held, mut old) = (saved_now(template), self.0.hold(template), Vec::new());
        let mut state = self.0.state();
        let taken = match state.pool(template, &saved, &mut old) {
            Some(pool) => {
                (pool.wants_opener, pool.used) = (true, Instant::now());
                pool.opener.take()
            }
            None => {
                let pool = held.map(|held| TemplatePool::new(template, saved, 0, held));
                state.templates.extend(pool.map(|pool| TemplatePool { wants_opener: true, ..pool }));
                None
            }
        };
        drop(state);
        TemplatePool::end(old);
        taken
    }

    /// Prepares workers for `template` until there are `count`. Returns their number.
    ///
    /// # Errors
    /// When one cannot be made, or that of `check`. Workers made before are kept.
    pub(super) fn prepare(
        &self,
        template: &VmTemplate,
        count: usize,
        check: impl Fn() -> Result<(), DaemonError>,
    ) -> Result<usize, DaemonError> {
        // Held until there is a pool of that template.
        let _overlays = self.0.overlays.hold(&template.written())?;
        // Other requests may take workers meanwhile: this makes so many, and no more.
        let mut made = 0;
        loop {
            check()?;
            let (saved, mut old) = (saved_now(template), Vec::new());
            let ready = {
                let mut state = self.0.state();
                if state.is_closed {
                    return Err(DaemonError::Ending);
                }
                state.pool(template, &saved, &mut old).map_or(0, |pool| {
                    pool.used = Instant::now();
                    pool.ready.len()
                })
            };
            TemplatePool::end(old);
            if ready >= count || made >= count {
                return Ok(ready);
            }
            let step = (count - ready).min(STEP);
            self.0.put(template, &saved, self.0.make(template, step)?);
            made += step;
        }
    }

    /// Returns the number of workers prepared for VMs.
    pub(super) fn len(&self) -> usize {
        self.0.state().templates.iter().map(|pool| pool.ready.len()).sum()
    }

    /// Ends all workers. No more are made.
    pub(super) fn close(&self) {
        let mut state = self.0.state();
        state.is_closed = true;
        let templates = std::mem::take(&mut state.templates);
        drop(state);
        self.0.changed.notify_all();
        TemplatePool::end(templates);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn none_is_prepared_while_a_request_makes_vms_nor_just_after_but_not_for_ever() {
        let (mut state, begun) = (State::default(), Instant::now());
        assert!(state.rest(begun).is_zero(), "there was no request");
        (state.busy, state.busy_since) = (1, Some(begun));
        assert_eq!(state.rest(begun), MAX_BUSY);
        assert_eq!(state.rest(begun + MAX_BUSY / 2), MAX_BUSY / 2);
        // More requests follow without end.
        assert!(state.rest(begun + MAX_BUSY).is_zero());
        let ended = begun + MAX_BUSY / 2;
        (state.busy, state.busy_since, state.idle_since) = (0, None, Some(ended));
        assert_eq!(state.rest(ended), REST);
        assert!(state.rest(ended + REST).is_zero());
    }
}
