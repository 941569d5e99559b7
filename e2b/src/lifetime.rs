//! Background tasks: pause sandboxes when their time is over, kill those that run on, and forget those that have gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clade_api::ClientError;
use jiff::{SignedDuration, Timestamp};

use crate::error::Answer;
use crate::gateway::Gateway;
use crate::records::{RecordEntry, SandboxRecord};
use crate::sandboxes::INIT_TIME;

/// Interval of the checks for sandboxes whose time is over, and for those that have gone.
const TICK: Duration = Duration::from_millis(250);
const SWEEP: Duration = Duration::from_secs(5);
/// Time after its end at which a sandbox that still runs is killed.
const OVERDUE: SignedDuration = SignedDuration::from_secs(INIT_TIME + 30);
/// Sandboxes of one owner paused or killed at a time because their time is over.
const MAX_PAUSING: usize = 8;

/// The sandboxes that are being paused, by owner.
#[derive(Debug, Default)]
struct Pausing(Mutex<BTreeMap<String, BTreeSet<String>>>);

/// One such sandbox, until this is dropped.
#[derive(Debug)]
struct OnePausing {
    of: Arc<Pausing>,
    owner: String,
    id: String,
}

impl Pausing {
    /// Takes a place for a sandbox. None if the sandbox is already being paused, or its owner has
    /// no place left.
    fn begin(self: &Arc<Self>, record: &SandboxRecord) -> Option<OnePausing> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ids = all.entry(record.owner.clone()).or_default();
        if ids.len() >= MAX_PAUSING || !ids.insert(record.id.clone()) {
            return None;
        }
        Some(OnePausing { of: Arc::clone(self), owner: record.owner.clone(), id: record.id.clone() })
    }
}

impl Drop for OnePausing {
    fn drop(&mut self) {
        let mut all = self.of.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ids) = all.get_mut(&self.owner) {
            ids.remove(&self.id);
            if ids.is_empty() {
                all.remove(&self.owner);
            }
        }
    }
}

impl Gateway {
    /// Forgets sandboxes and snapshots whose VMs or checkpoints have gone.
    pub(crate) async fn sweep(&self) -> Result<(), ClientError> {
        // Before the VMs are listed: a sandbox that is made meanwhile stays.
        let (sandboxes, snapshots) = (self.0.sandboxes.list(), self.0.snapshots.list());
        if !sandboxes.is_empty() {
            let there = self.0.supervisor.vm_names().await?;
            for record in sandboxes.iter().filter(|record| !there.contains(&record.id)) {
                self.0.sandboxes.remove(&record.id);
            }
        }
        if !snapshots.is_empty() {
            let all = self.0.supervisor.checkpoints().await?;
            for snapshot in snapshots.iter().filter(|one| !one.is_kept && !all.iter().any(|there| there.name == one.id))
            {
                self.0.snapshots.remove(&snapshot.id);
            }
        }
        Ok(())
    }

    /// Sweeps for ever.
    pub(crate) async fn keep_swept(&self) {
        loop {
            if let Err(error) = self.sweep().await {
                tracing::debug!(%error, "sandboxes are not looked for");
            }
            tokio::time::sleep(SWEEP).await;
        }
    }

    /// Pauses sandboxes whose time is over, and kills overdue ones, for ever. Each has a task of its
    /// own: a slow one delays no other owner's.
    pub(crate) async fn keep_time(&self) {
        let pausing = Arc::new(Pausing::default());
        loop {
            tokio::time::sleep(TICK).await;
            let now = Timestamp::now();
            for entry in self.0.sandboxes.select(|record| record.is_to_pause(now) || record.is_overdue(now, OVERDUE)) {
                let Some(one) = pausing.begin(&entry.get()) else { continue };
                let gateway = self.clone();
                tokio::spawn(async move {
                    if let Err(error) = gateway.end_time(&entry, now).await {
                        tracing::debug!(%error.message, id = one.id, "a sandbox neither pauses nor ends");
                    }
                    drop(one);
                });
            }
        }
    }

    /// Pauses or kills a sandbox whose time is over at `now`, if it has not got more time meanwhile.
    async fn end_time(&self, entry: &RecordEntry<SandboxRecord>, now: Timestamp) -> Answer<()> {
        if entry.get().is_to_pause(now) {
            return self.pause(entry, |record| record.is_to_pause(now)).await;
        }
        self.kill_if(entry, |record| record.is_overdue(now, OVERDUE)).await
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{Fake, until};

    #[tokio::test]
    async fn a_snapshot_whose_removal_has_no_answer_goes_with_its_checkpoint() {
        let fake = Fake::new();
        let key = fake.key("one");
        let id = fake.sandbox(&key, json!({})).await;
        let (_, taken) = fake.call(&key, "POST", &format!("/sandboxes/{id}/snapshots"), json!({})).await;
        let snapshot = taken["snapshotID"].as_str().unwrap().to_owned();
        let remove = async || fake.call(&key, "DELETE", &format!("/templates/{snapshot}"), Value::Null).await.0;
        // Refused: it is kept as before.
        fake.world.supervisor_state().refused = Some(format!("DELETE checkpoint {snapshot}"));
        assert_eq!(remove().await, 409);
        fake.gateway.sweep().await.unwrap();
        assert!(fake.gateway.0.snapshots.get(&snapshot).is_some_and(|entry| entry.get().is_kept));
        // The same twice at a time.
        fake.world.hold(&format!("DELETE checkpoint {snapshot}"));
        let release = async {
            fake.world.until_held().await;
            tokio::task::yield_now().await;
            fake.world.release();
        };
        assert_eq!(tokio::join!(remove(), remove(), release), (409, 409, ()));
        assert!(fake.gateway.0.snapshots.get(&snapshot).is_some_and(|entry| entry.get().is_kept));
        // Carried out, and its answer is lost.
        fake.world.supervisor_state().refused = None;
        fake.world.supervisor_state().lost = Some(format!("DELETE checkpoint {snapshot}"));
        assert_eq!(remove().await, 500);
        assert!(!fake.world.supervisor_state().checkpoints.contains_key(&snapshot));
        fake.gateway.sweep().await.unwrap();
        assert!(fake.gateway.0.snapshots.get(&snapshot).is_none());
    }

    #[tokio::test]
    async fn a_sandbox_that_has_lost_its_end_is_killed() {
        let fake = Fake::new();
        let key = fake.key("one");
        let (lost, runs) = (fake.sandbox(&key, json!({})).await, fake.sandbox(&key, json!({})).await);
        assert_eq!(fake.call(&key, "POST", &format!("/sandboxes/{lost}/pause"), json!({})).await.0, 204);
        fake.world.supervisor_state().refused = Some(format!("PUT vm {lost} ttl"));
        let resumed = fake.call(&key, "POST", &format!("/sandboxes/{lost}/connect"), json!({ "timeout": 60 })).await;
        assert_ne!(resumed.0, 200, "{resumed:?}");
        let vm = fake.world.supervisor_state().vms[&lost].clone();
        assert!(!vm.is_paused && vm.ttl.is_none(), "the sandbox runs without an end: {vm:?}");
        let set = |id: &str, end_at: Timestamp| {
            let entry = fake.gateway.0.sandboxes.get(id).unwrap();
            fake.gateway.0.sandboxes.change(&entry, |record| record.end_at = end_at);
        };
        // Its time has been over for a moment only.
        set(&runs, Timestamp::now());
        set(&lost, Timestamp::UNIX_EPOCH);
        let gateway = fake.gateway.clone();
        let keeping = tokio::spawn(async move { gateway.keep_time().await });
        until("the sandbox to be killed", || fake.gateway.0.sandboxes.get(&lost).is_none()).await;
        keeping.abort();
        assert!(!fake.world.supervisor_state().vms.contains_key(&lost));
        assert!(fake.world.supervisor_state().vms.contains_key(&runs));
    }

    #[tokio::test]
    async fn a_sandbox_that_pauses_slowly_delays_no_other_owners() {
        let fake = Fake::new();
        let (one, two) = (fake.key("one"), fake.key("two"));
        let mut slow = Vec::new();
        for _ in 0..2 * MAX_PAUSING {
            slow.push(fake.sandbox(&one, json!({ "autoPause": true })).await);
        }
        let other = fake.sandbox(&two, json!({ "autoPause": true })).await;
        for id in &slow {
            fake.world.hold(&format!("{id} pause"));
        }
        for record in fake.gateway.0.sandboxes.list() {
            let entry = fake.gateway.0.sandboxes.get(&record.id).unwrap();
            fake.gateway.0.sandboxes.change(&entry, |record| record.end_at = Timestamp::UNIX_EPOCH);
        }
        let gateway = fake.gateway.clone();
        let keeping = tokio::spawn(async move { gateway.keep_time().await });
        until("the other owner's to pause", || fake.gateway.0.sandboxes.get(&other).unwrap().get().paused).await;
        until("as many as one owner may have", || {
            let supervisor_state = fake.world.supervisor_state();
            supervisor_state.log.iter().filter(|what| what.ends_with(" pause")).count() == MAX_PAUSING + 1
        })
        .await;
        fake.world.release();
        until("all to pause", || fake.world.supervisor_state().vms.values().all(|vm| vm.is_paused)).await;
        // A record follows its VM.
        let is_paused = |id: &String| fake.gateway.0.sandboxes.get(id).unwrap().get().paused;
        until("the records", || slow.iter().all(is_paused)).await;
        keeping.abort();
        let log = fake.world.supervisor_state().log.clone();
        let pauses = log.iter().filter(|what| what.ends_with(" pause")).count();
        assert_eq!(pauses, slow.len() + 1, "each was paused once: {log:?}");
        let key = &one;
        assert_eq!(fake.call(key, "GET", &format!("/sandboxes/{}", slow[0]), Value::Null).await.1["state"], "paused");
    }
}
