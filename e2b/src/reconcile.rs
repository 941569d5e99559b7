//! Repairs after a supervisor that was killed in the middle of a call.
//!
//! A call changes a VM and a record, one after the other. A supervisor that is killed in between leaves
//! them apart. The next one makes them agree before it takes calls:
//!
//! | found | done |
//! |---|---|
//! | a VM of a sandbox without a record: it was being made | the VM is stopped |
//! | the VM of a running sandbox is paused | the sandbox is paused, without an end |
//! | the VM of a paused sandbox runs: it was being resumed | the VM is paused |
//! | the VM of a running sandbox runs | the VM has the end of the sandbox again |
//! | a checkpoint of a snapshot without a record: it was being taken | the checkpoint is removed |
//! | a record without a VM or a checkpoint | forgotten, as at any time |

use std::sync::Arc;
use std::time::Duration;

use clade_api::VmState;
use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::records::{RecordEntry, SandboxRecord};
use crate::sandboxes::{TEMPLATE_LABEL, is_sandbox_name};
use crate::source::SNAPSHOT_PREFIX;

/// Sandboxes that are looked at at a time.
const MAX_AT_ONCE: usize = 16;
/// Time limit for one of them.
const TIME_LIMIT: Duration = Duration::from_secs(15);

impl Gateway {
    /// Makes VMs, checkpoints and records agree. No call is answered meanwhile.
    pub(crate) async fn reconcile(&self) {
        let turns = Arc::new(Semaphore::new(MAX_AT_ONCE));
        let mut tasks = tokio::task::JoinSet::new();
        for entry in self.0.sandboxes.select(|_| true) {
            let (gateway, turns) = (self.clone(), Arc::clone(&turns));
            tasks.spawn(async move {
                // The semaphore is never closed.
                let _turn = turns.acquire_owned().await;
                // A process of a VM may answer late or never.
                match timeout(TIME_LIMIT, gateway.reconcile_sandbox(&entry)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(%error.message, id = entry.get().id, "a sandbox is left as it is"),
                    Err(_) => tracing::warn!(id = entry.get().id, "a sandbox does not answer, and is left as it is"),
                }
            });
        }
        let names = self.0.supervisor.vm_names().await.unwrap_or_else(|error| {
            tracing::warn!(%error, "VMs without records are left as they are");
            Vec::new()
        });
        for name in names.into_iter().filter(|name| is_sandbox_name(name) && !self.0.sandboxes.has_file(name)) {
            let (gateway, turns) = (self.clone(), Arc::clone(&turns));
            tasks.spawn(async move {
                let _turn = turns.acquire_owned().await;
                if timeout(TIME_LIMIT, gateway.stop_unrecorded(&name)).await.is_err() {
                    tracing::warn!(name, "a VM without a record does not answer, and is left as it is");
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        if let Err(error) = self.remove_unrecorded_checkpoints().await {
            tracing::warn!(%error.message, "checkpoints without records are left as they are");
        }
    }

    async fn reconcile_sandbox(&self, entry: &RecordEntry<SandboxRecord>) -> Answer<()> {
        let record = entry.get();
        let vm = match self.0.supervisor.vm(&record.id).await.map_err(GatewayError::from) {
            Ok(vm) => vm,
            // The sweep forgets the sandbox of a VM that has ended.
            Err(error) if matches!(error.status.as_u16(), 404 | 410) => return Ok(()),
            Err(error) => return Err(error),
        };
        if vm.state == VmState::Stopped {
            return Ok(());
        }
        // A VM that is only suspended wakes for the next request.
        match (record.paused, vm.paused || vm.state == VmState::Paused) {
            (true, true) => Ok(()),
            (false, true) => {
                self.end_never(&record.id).await?;
                self.0.sandboxes.change(entry, |record| record.paused = true);
                Ok(())
            }
            // A resume that was cut short. The record stays that of a paused sandbox: otherwise a pause that fails
            // would end it, as its time is over.
            (true, false) => {
                self.end_never(&record.id).await?;
                self.0.supervisor.pause(&record.id).await?;
                self.suspend(&record.id).await;
                Ok(())
            }
            // It pauses at its end, by this process.
            (false, false) if record.auto_pause => self.end_never(&record.id).await,
            (false, false) => {
                let left = Timestamp::now().duration_until(record.end_at).as_secs();
                self.end_in(&record.id, left.max(1)).await
            }
        }
    }

    /// Stops a VM that has the name of a sandbox and no record, if it was made for a sandbox.
    async fn stop_unrecorded(&self, name: &str) {
        // A VM of the host's own may have such a name.
        let vm = self.0.supervisor.vm(name).await;
        if vm.is_ok_and(|vm| vm.labels.has_key(TEMPLATE_LABEL)) {
            tracing::info!(name, "stops a VM that was being made for a sandbox");
            self.stop(name).await;
        }
    }

    /// Removes checkpoints that were taken for snapshots and have no record.
    async fn remove_unrecorded_checkpoints(&self) -> Answer<()> {
        let all = self.0.supervisor.checkpoints().await?;
        let ours = all.iter().filter(|one| one.name.starts_with(SNAPSHOT_PREFIX));
        for one in ours.filter(|one| !self.0.snapshots.has_file(&one.name)) {
            tracing::info!(one.name, "removes the checkpoint of a snapshot that was being taken");
            self.remove_checkpoint(&one.name).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};
    use tower::ServiceExt;

    use super::*;
    use crate::testing::Fake;

    /// Supervisor and records, which must agree.
    fn expect_agreement(fake: &Fake, next: &Gateway, what: &str) {
        let state = fake.world.supervisor_state();
        let records = next.0.sandboxes.list();
        let ids: BTreeSet<&str> = records.iter().map(|record| record.id.as_str()).collect();
        let vms: BTreeSet<&str> = state.vms.keys().map(String::as_str).collect();
        assert_eq!(ids, vms, "{what}");
        for record in &records {
            let vm = &state.vms[&record.id];
            assert_eq!(record.paused, vm.is_paused, "{what}: {record:?}");
            let ends = !record.paused && !record.auto_pause;
            assert_eq!(vm.ttl.is_some(), ends, "{what}: {record:?}, {vm:?}");
        }
        let snapshots = next.0.snapshots.list();
        let mut checkpoints: BTreeSet<&str> = snapshots.iter().map(|one| one.id.as_str()).collect();
        checkpoints.insert("base");
        assert_eq!(checkpoints, state.checkpoints.keys().map(String::as_str).collect(), "{what}");
    }

    /// Begins a call, and kills the gateway at its request number `after` to the supervisor or an agent,
    /// which is still carried out. Returns whether the call came so far.
    async fn crash(call: &str, after: usize) -> bool {
        let fake = Fake::new();
        let key = fake.key("one");
        let runs = fake.sandbox(&key, json!({})).await;
        let pauses = fake.sandbox(&key, json!({ "autoPause": true })).await;
        let sleeps = fake.sandbox(&key, json!({})).await;
        assert_eq!(fake.call(&key, "POST", &format!("/sandboxes/{sleeps}/pause"), json!({})).await.0, 204);
        let (_, taken) = fake.call(&key, "POST", &format!("/sandboxes/{runs}/snapshots"), json!({})).await;
        let snapshot = taken["snapshotID"].as_str().unwrap().to_owned();
        let (method, path, body) = match call {
            "create" => ("POST", "/sandboxes".to_owned(), json!({ "templateID": "base" })),
            "fork" => ("POST", format!("/sandboxes/{runs}/fork"), json!({ "count": 2 })),
            "fork of a paused one" => ("POST", format!("/sandboxes/{sleeps}/fork"), json!({})),
            "fork of a snapshot" => ("POST", format!("/snapshots/{snapshot}/fork"), json!({ "count": 2 })),
            "pause" => ("POST", format!("/sandboxes/{runs}/pause"), json!({})),
            "pause at its end" => ("POST", format!("/sandboxes/{pauses}/pause"), json!({})),
            "resume" => ("POST", format!("/sandboxes/{sleeps}/connect"), json!({ "timeout": 60 })),
            "timeout" => ("POST", format!("/sandboxes/{runs}/timeout"), json!({ "timeout": 60 })),
            "snapshot" => ("POST", format!("/sandboxes/{runs}/snapshots"), json!({ "name": "named" })),
            "removal" => ("DELETE", format!("/templates/{snapshot}"), Value::Null),
            "kill" => ("DELETE", format!("/sandboxes/{runs}"), Value::Null),
            other => panic!("{other}"),
        };
        let before = fake.world.supervisor_state().log.len();
        fake.world.supervisor_state().hold_after = Some(before + after);
        // The supervisor's process, with the gateway in it.
        let process = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let request = Fake::ask(&key, method, &path, &body);
        let mut called = process.spawn(fake.router.clone().oneshot(request));
        let is_held = tokio::select! {
            () = fake.world.until_held() => true,
            answer = &mut called => {
                assert!(answer.unwrap().unwrap().status().is_success(), "{call}");
                false
            }
        };
        // Its tasks have gone afterwards; none of them needs this thread.
        std::thread::spawn(move || process.shutdown_timeout(Duration::from_secs(60))).join().unwrap();
        fake.world.release();
        // The request that was held is carried out.
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        let next = fake.next();
        next.reconcile().await;
        next.sweep().await.unwrap();
        expect_agreement(&fake, &next, &format!("{call}, killed at request {after}"));
        is_held
    }

    #[tokio::test]
    async fn a_supervisor_killed_within_any_call_leaves_nothing_half_done() {
        for call in [
            "create",
            "fork",
            "fork of a paused one",
            "fork of a snapshot",
            "pause",
            "pause at its end",
            "resume",
            "timeout",
            "snapshot",
            "removal",
            "kill",
        ] {
            let mut after = 0;
            while crash(call, after).await {
                after += 1;
            }
            assert!(after > 0, "{call} has no step");
        }
    }

    #[tokio::test]
    async fn a_running_sandbox_that_is_suspended_is_not_paused() {
        let fake = Fake::new();
        let key = fake.key("one");
        let (runs, sleeps) = (fake.sandbox(&key, json!({})).await, fake.sandbox(&key, json!({})).await);
        assert_eq!(fake.call(&key, "POST", &format!("/sandboxes/{sleeps}/pause"), json!({})).await.0, 204);
        for id in [&runs, &sleeps] {
            fake.world.supervisor_state().vms.get_mut(id).unwrap().is_suspended = true;
        }
        let next = fake.next();
        next.reconcile().await;
        expect_agreement(&fake, &next, "suspended");
        let records = next.0.sandboxes.list();
        let paused: Vec<_> = records.iter().filter(|record| record.paused).map(|record| &record.id).collect();
        assert_eq!(paused, [&sleeps]);
    }

    /// Its record is changed before the VM: the supervisor may end in between.
    #[tokio::test]
    async fn a_pause_that_was_cut_short_is_done_and_ends_nothing_if_it_fails() {
        let fake = Fake::new();
        let key = fake.key("one");
        let (done, refused) = (fake.sandbox(&key, json!({})).await, fake.sandbox(&key, json!({})).await);
        for id in [&done, &refused] {
            let entry = fake.gateway.0.sandboxes.get(id).unwrap();
            fake.gateway.0.sandboxes.change(&entry, |record| record.paused = true);
            assert!(fake.world.supervisor_state().vms[id].ttl.is_some());
        }
        fake.world.supervisor_state().refused = Some(format!("{refused} pause"));
        let next = fake.next();
        next.reconcile().await;
        for id in [&done, &refused] {
            let vm = fake.world.supervisor_state().vms[id].clone();
            assert_eq!((vm.is_paused, vm.ttl), (id == &done, None), "{vm:?}");
            assert!(next.0.sandboxes.get(id).unwrap().get().paused, "the next resume starts its time");
        }
    }

    #[tokio::test]
    async fn a_vm_of_the_hosts_own_stays() {
        let fake = Fake::new();
        let key = fake.key("one");
        let id = fake.sandbox(&key, json!({})).await;
        // A name of the form, without the label.
        let vm = fake.world.supervisor_state().vms[&id].clone();
        let other = format!("i{}", "0".repeat(18));
        fake.world
            .supervisor_state()
            .vms
            .insert(other.clone(), crate::testing::Vm { labels: Value::Null, ..vm.clone() });
        std::fs::write(fake.world.socket(&other).with_extension("sock"), "").unwrap();
        // The label, which forks by the host inherit, with another name.
        fake.world.supervisor_state().vms.insert(format!("{id}-1"), vm);
        std::fs::write(fake.world.socket(&format!("{id}-1")).with_extension("sock"), "").unwrap();
        fake.next().reconcile().await;
        assert_eq!(fake.world.supervisor_state().vms.len(), 3);
    }

    #[test]
    fn names_of_sandboxes_are_known() {
        let of = |rest: &str| format!("i{}{rest}", "0123456789abcdef01");
        for name in [of(""), of("x1"), of("x100")] {
            assert!(is_sandbox_name(&name), "{name}");
        }
        for name in
            [of("x"), of("x-1"), of("-1"), of("0"), "web".to_owned(), format!("j{}", &of("")[1..]), String::new()]
        {
            assert!(!is_sandbox_name(&name), "{name}");
        }
    }
}
