//! Events of VMs and checkpoints, for clients that follow them (Server-Sent Events).
//!
//! The newest events are kept in a ring. Each reader has a place in it and takes the events from
//! there on. A slow reader delays nothing: it loses events, and gets the number lost.

use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::sleep;

use clade_api::ProblemKind;
use clade_api::http::{ApiError, Frames};

/// Most events kept.
const MAX_EVENTS: usize = 16 << 10;
/// Most bytes of them.
const MAX_BYTES: usize = 8 << 20;
/// Readers at a time.
const MAX_READERS: usize = 64;
/// Bytes that a reader takes from the ring at once.
const MAX_TAKEN: usize = 64 << 10;
/// An empty line is sent after this time without events. That detects clients that have gone.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

#[derive(Debug, Default)]
struct Ring {
    /// The newest events in the form that is sent.
    kept: VecDeque<Arc<str>>,
    bytes: usize,
    /// The number of the newest event. The first has 1.
    newest: u64,
    zygote_restarts: u64,
    /// Running VMs.
    vms: BTreeSet<String>,
    /// Suspended VMs, also of an earlier supervisor.
    suspended: BTreeSet<String>,
}

/// The events of a supervisor.
#[derive(Debug)]
pub(super) struct Events {
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
    /// Distinguishes ids of this supervisor from those of an earlier one.
    epoch: String,
    readers: Arc<Semaphore>,
}

impl Default for Events {
    fn default() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            ring: Mutex::default(),
            newest: watch::Sender::new(0),
            epoch: format!("{:x}", since.as_nanos()),
            readers: Arc::new(Semaphore::new(MAX_READERS)),
        }
    }
}

impl Events {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, ring: &mut Ring, name: &str, mut what: Value) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        ring.newest += 1;
        let id = format!("{}-{}", self.epoch, ring.newest);
        what["event"] = name.into();
        what["id"] = id.as_str().into();
        what["at"] = since.as_secs_f64().into();
        let text: Arc<str> = format!("event: {name}\nid: {id}\ndata: {what}\n\n").into();
        ring.bytes += text.len();
        ring.kept.push_back(text);
        while ring.kept.len() > MAX_EVENTS || (ring.bytes > MAX_BYTES && ring.kept.len() > 1) {
            ring.bytes -= ring.kept.pop_front().map_or(0, |text| text.len());
        }
        self.newest.send_replace(ring.newest);
    }

    fn created(&self, ring: &mut Ring, name: &str, parent: Option<&str>) {
        if !ring.vms.insert(name.to_owned()) {
            // An earlier VM of the name has ended without an announcement.
            self.add(ring, "vm.ended", json!({ "name": name, "reason": null }));
        }
        ring.suspended.remove(name);
        self.add(ring, "vm.created", json!({ "name": name, "parent": parent }));
    }

    /// A VM was booted, and runs.
    pub(super) fn booted(&self, name: &str) {
        let ring = &mut *self.ring();
        self.created(ring, name, None);
        self.add(ring, "vm.booted", json!({ "name": name }));
    }

    /// Children were made of `parent`, which was paused for `pause_us` microseconds.
    pub(super) fn forked(&self, parent: &str, children: &[String], pause_us: f64) {
        let ring = &mut *self.ring();
        children.iter().for_each(|child| self.created(ring, child, Some(parent)));
        self.add(ring, "vm.forked", json!({ "parent": parent, "children": children, "pause_us": pause_us }));
    }

    /// A VM has ended, for `reason` if it is known.
    pub(super) fn ended(&self, name: &str, reason: Option<&str>) {
        let ring = &mut *self.ring();
        ring.suspended.remove(name);
        if ring.vms.remove(name) {
            self.add(ring, "vm.ended", json!({ "name": name, "reason": reason }));
        }
    }

    /// A VM was suspended, which had been awake.
    pub(super) fn suspended(&self, name: &str, written_pages: u64) {
        let ring = &mut *self.ring();
        if !ring.suspended.insert(name.to_owned()) {
            // Its process has not reported yet that it was woken.
            self.add(ring, "vm.woken", json!({ "name": name }));
        }
        self.add(ring, "vm.suspended", json!({ "name": name, "written_pages": written_pages }));
    }

    /// A suspended VM was woken, for whatever cause.
    pub(super) fn woken(&self, name: &str) {
        let ring = &mut *self.ring();
        if ring.suspended.remove(name) {
            self.add(ring, "vm.woken", json!({ "name": name }));
        }
    }

    pub(super) fn checkpoint_created(&self, name: &str, vm: &str) {
        self.add(&mut self.ring(), "checkpoint.created", json!({ "name": name, "vm": vm }));
    }

    pub(super) fn checkpoint_removed(&self, name: &str) {
        self.add(&mut self.ring(), "checkpoint.removed", json!({ "name": name }));
    }

    /// The zygote has been started again `count` times in all.
    pub(super) fn zygote_restarts(&self, count: u64) {
        let ring = &mut *self.ring();
        for number in ring.zygote_restarts + 1..=count {
            self.add(ring, "zygote.restarted", json!({ "count": number }));
        }
        ring.zygote_restarts = count;
    }

    /// Compares the VMs of the directory with the known ones. VMs that `is_ours` accepts are
    /// announced elsewhere; `reason` returns why a VM has ended.
    pub(super) fn observe(
        &self,
        there: &BTreeSet<String>,
        is_ours: impl Fn(&str) -> bool,
        reason: impl Fn(&str) -> Option<String>,
    ) {
        let ring = &mut *self.ring();
        // The end of one of ours is announced when its process has ended.
        let gone: Vec<String> = ring.vms.difference(there).filter(|name| !is_ours(name)).cloned().collect();
        for name in gone {
            ring.vms.remove(&name);
            self.add(ring, "vm.ended", json!({ "name": name, "reason": reason(&name) }));
        }
        for name in there {
            if !ring.vms.contains(name) && !is_ours(name) {
                self.created(ring, name, None);
            }
        }
    }

    /// Returns the events after `last`, an event's id; without one those from now on. The stream
    /// ends once `ending` is true.
    ///
    /// # Errors
    /// When there are too many readers, or `last` is not an id.
    pub(super) fn follow(
        self: &Arc<Self>,
        last: Option<&str>,
        ending: watch::Receiver<bool>,
    ) -> Result<Body, ApiError> {
        let no_id = || ApiError::new(ProblemKind::BadRequest, "Last-Event-ID is no event's id");
        let after = match last {
            None => Ok(self.ring().newest),
            Some(id) => match id.split_once('-') {
                Some((epoch, number)) if epoch == self.epoch => {
                    let number: u64 = number.parse().map_err(|_| no_id())?;
                    if number > self.ring().newest {
                        return Err(no_id());
                    }
                    Ok(number)
                }
                Some(_) => Err(()),
                None => return Err(no_id()),
            },
        };
        let text = format!("{MAX_READERS} clients follow the events");
        let permit = Arc::clone(&self.readers).try_acquire_owned();
        let permit = permit.map_err(|_| ApiError::new(ProblemKind::TooMany, text))?;
        let (to, frames) = mpsc::channel(1);
        let mut reader =
            Reader { events: Arc::clone(self), after: after.unwrap_or(0), newest: self.newest.subscribe() };
        // Another supervisor's id: the number of lost events is unknown.
        let first = if after.is_err() { lost(None) } else { ": follows\n\n".to_owned() };
        if after.is_err() {
            reader.after = self.ring().oldest() - 1;
        }
        tokio::spawn(feed(reader, first, to, ending, permit));
        Ok(Body::new(Frames(frames)))
    }
}

fn lost(count: Option<u64>) -> String {
    format!("event: lost\ndata: {}\n\n", json!({ "event": "lost", "count": count }))
}

impl Ring {
    /// Returns the number of the oldest event kept, or of the next one if the ring is empty.
    fn oldest(&self) -> u64 {
        self.newest + 1 - self.kept.len() as u64
    }
}

/// A place in the ring.
struct Reader {
    events: Arc<Events>,
    /// The number of the last event that was taken.
    after: u64,
    newest: watch::Receiver<u64>,
}

impl Reader {
    /// Waits for the next events.
    async fn next(&mut self) -> String {
        let after = self.after;
        // Its sender lives as long as the events do.
        let _ = self.newest.wait_for(|newest| *newest > after).await;
        let ring = self.events.ring();
        let mut text = String::new();
        let missed = ring.oldest() - 1;
        if missed > self.after {
            text.push_str(&lost(Some(missed - self.after)));
            self.after = missed;
        }
        let at = (self.after - missed) as usize;
        for event in ring.kept.iter().skip(at) {
            // Writing to a String does not fail.
            let _ = text.write_str(event);
            self.after += 1;
            if text.len() >= MAX_TAKEN {
                break;
            }
        }
        text
    }
}

/// Sends a reader its events until it goes, or the supervisor ends.
async fn feed(
    mut reader: Reader,
    mut text: String,
    to: mpsc::Sender<Bytes>,
    mut ending: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
) {
    loop {
        if to.send(Bytes::from(text)).await.is_err() {
            return;
        }
        text = tokio::select! {
            text = reader.next() => text,
            () = sleep(KEEP_ALIVE) => ":\n\n".to_owned(),
            () = to.closed() => return,
            () = async { drop(ending.wait_for(|ending| *ending).await) } => return,
        };
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    /// Returns the data of the next events, as many as `count`.
    async fn next(body: &mut Body, count: usize) -> Vec<Value> {
        let mut all = Vec::new();
        while all.len() < count {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            let text = String::from_utf8(frame.to_vec()).unwrap();
            all.extend(
                text.lines()
                    .filter_map(|line| line.strip_prefix("data: "))
                    .map(|data| serde_json::from_str::<Value>(data).unwrap()),
            );
        }
        assert_eq!(all.len(), count, "{all:?}");
        all
    }

    fn names(events: &[Value]) -> Vec<&str> {
        events.iter().map(|event| event["event"].as_str().unwrap()).collect()
    }

    #[test]
    fn a_reader_sees_what_happens_and_goes_on_where_it_was() {
        run(async {
            let (events, ending) = (Arc::new(Events::default()), watch::Sender::new(false));
            events.booted("before");
            let mut body = events.follow(None, ending.subscribe()).unwrap();
            events.booted("web");
            events.forked("web", &["web-1".to_owned()], 7.0);
            let seen = next(&mut body, 4).await;
            assert_eq!(names(&seen), ["vm.created", "vm.booted", "vm.created", "vm.forked"]);
            assert_eq!(seen[3]["children"], json!(["web-1"]));
            assert_eq!(seen[2]["parent"], "web");
            let mut again = events.follow(seen[1]["id"].as_str(), ending.subscribe()).unwrap();
            assert_eq!(next(&mut again, 2).await, seen[2..]);
            events.ended("web", Some("stopped"));
            events.ended("web", None);
            events.ended("nobody", None);
            events.checkpoint_created("cp", "web-1");
            let last = next(&mut again, 2).await;
            assert_eq!(names(&last), ["vm.ended", "checkpoint.created"]);
            assert_eq!(last[0]["reason"], "stopped");
            ending.send_replace(true);
            assert!(again.frame().await.is_none());
        });
    }

    #[test]
    fn each_suspension_has_one_wake_before_the_next_also_if_it_is_not_reported() {
        run(async {
            let (events, ending) = (Arc::new(Events::default()), watch::Sender::new(false));
            let mut body = events.follow(None, ending.subscribe()).unwrap();
            events.booted("web");
            events.suspended("web", 3);
            events.woken("web");
            events.woken("web");
            events.suspended("web", 2);
            events.suspended("web", 1);
            events.ended("web", None);
            events.woken("web");
            // Another VM of the name, and a third one whose predecessor has ended without an announcement.
            events.booted("web");
            events.suspended("web", 4);
            events.booted("web");
            events.suspended("web", 5);
            // A VM of an earlier supervisor, and another one of the name.
            events.suspended("older", 6);
            events.ended("older", None);
            events.booted("older");
            events.suspended("older", 7);
            events.checkpoint_created("last", "web");
            let seen = next(&mut body, 20).await;
            let of_vm = ["vm.created", "vm.booted", "vm.suspended"];
            let expected = [
                &of_vm[..],
                &["vm.woken", "vm.suspended", "vm.woken", "vm.suspended", "vm.ended"],
                &of_vm,
                &["vm.ended"],
                &of_vm,
                &["vm.suspended"],
                &of_vm,
                &["checkpoint.created"],
            ];
            assert_eq!(names(&seen), expected.concat());
        });
    }

    #[test]
    fn a_reader_that_is_too_slow_loses_and_hears_how_many() {
        run(async {
            let (events, ending) = (Arc::new(Events::default()), watch::Sender::new(false));
            let mut body = events.follow(None, ending.subscribe()).unwrap();
            // The reader puts only a little into the channel, and then the ring overruns.
            for n in 0..MAX_EVENTS + 10 {
                events.checkpoint_removed(&n.to_string());
            }
            let first = next_some(&mut body).await;
            assert_eq!((first["event"].as_str(), first["count"].as_u64()), (Some("lost"), Some(10)));
            assert_eq!(events.ring().kept.len(), MAX_EVENTS);
        });
    }

    async fn next_some(body: &mut Body) -> Value {
        loop {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            let text = String::from_utf8(frame.to_vec()).unwrap();
            if let Some(data) = text.lines().find_map(|line| line.strip_prefix("data: ")) {
                return serde_json::from_str(data).unwrap();
            }
        }
    }

    #[test]
    fn bytes_readers_and_ids_are_bounded() {
        run(async {
            let (events, ending) = (Arc::new(Events::default()), watch::Sender::new(false));
            let name = "x".repeat(MAX_BYTES / 4);
            (0..8).for_each(|_| events.checkpoint_removed(&name));
            assert!(events.ring().bytes <= MAX_BYTES);
            for id in ["", "x", &format!("{}-9", events.epoch), &format!("{}-x", events.epoch)] {
                assert!(events.follow(Some(id), ending.subscribe()).is_err(), "{id}");
            }
            let mut of_another = events.follow(Some("abc-3"), ending.subscribe()).unwrap();
            let first = next_some(&mut of_another).await;
            assert_eq!((first["event"].as_str(), first["count"].is_null()), (Some("lost"), true));
            drop(of_another);
            tokio::task::yield_now().await;
            let all: Vec<_> = (0..MAX_READERS).map(|_| events.follow(None, ending.subscribe()).unwrap()).collect();
            let refused = events.follow(None, ending.subscribe()).map_err(|error| error.kind);
            assert_eq!(refused.map(drop), Err(ProblemKind::TooMany));
            drop(all);
        });
    }

    #[test]
    fn vms_of_other_processes_are_found_and_missed() {
        run(async {
            let (events, ending) = (Arc::new(Events::default()), watch::Sender::new(false));
            let mut body = events.follow(None, ending.subscribe()).unwrap();
            let there = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
            events.observe(&there(&["a", "ours"]), |name| name == "ours", |_| None);
            events.observe(&there(&["a", "b", "ours"]), |name| name == "ours", |_| None);
            // A VM that was made after the directory was read has not ended.
            events.observe(&there(&["b"]), |name| name == "a", |_| None);
            events.observe(&there(&["b"]), |_| false, |name| Some(format!("why {name}")));
            let seen = next(&mut body, 3).await;
            assert_eq!(names(&seen), ["vm.created", "vm.created", "vm.ended"]);
            assert_eq!((&seen[2]["name"], &seen[2]["reason"]), (&json!("a"), &json!("why a")));
            // A name that is taken again before its end was seen.
            events.booted("b");
            assert_eq!(names(&next(&mut body, 3).await), ["vm.ended", "vm.created", "vm.booted"]);
        });
    }
}
