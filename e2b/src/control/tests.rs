//! Calls beside a supervisor that is a task of the test.

use serde_json::json;

use super::*;
use crate::testing::{Fake, until};

/// Most requests to the supervisor and to agents that a call takes.
const MAX_STEPS: usize = 12;

#[tokio::test]
async fn a_client_that_goes_leaves_no_vm_without_a_record_or_an_end() {
    let fake = Fake::new();
    let key = fake.key("one");
    let body = json!({ "templateID": "base", "timeout": 300 });
    let mut steps = 0;
    while fake.drop_after(steps, Fake::ask(&key, "POST", "/sandboxes", &body)).await {
        steps += 1;
    }
    assert!((4..MAX_STEPS).contains(&steps), "{steps}");
    let parent = fake.sandbox(&key, Value::Null).await;
    let (path, body) = (format!("/sandboxes/{parent}/fork"), json!({ "count": 3, "timeout": 300 }));
    let mut forks = 0;
    while fake.drop_after(forks, Fake::ask(&key, "POST", &path, &body)).await {
        forks += 1;
    }
    assert!(forks >= 4, "{forks}");
    until("all VMs have a record and an end", || {
        let fleet = fake.world.fleet();
        let records = fake.gateway.0.sandboxes.list();
        let is_so =
            fleet.vms.iter().all(|(name, vm)| vm.ttl == Some(300.0) && records.iter().any(|one| one.id == *name));
        is_so && fleet.vms.len() == records.len() && records.len() >= steps + forks * 3
    })
    .await;
}

#[tokio::test]
async fn a_client_that_goes_leaves_no_record_that_contradicts_its_vm() {
    let fake = Fake::new();
    let key = fake.key("one");
    let id = fake.sandbox(&key, Value::Null).await;
    let is_one = |is_paused: bool| {
        let (vm, record) = (fake.world.fleet().vms[&id].clone(), fake.gateway.0.sandboxes.get(&id).unwrap().get());
        record.paused == is_paused && vm.is_paused == is_paused && vm.ttl.is_none() == is_paused
    };
    let empty = json!({});
    for (forth, back, is_paused) in [("pause", "connect", true), ("connect", "pause", false)] {
        let mut steps = 0;
        loop {
            let path = format!("/sandboxes/{id}/{forth}");
            let went = fake.drop_after(steps, Fake::ask(&key, "POST", &path, &empty)).await;
            until("the call to be done", || is_one(is_paused)).await;
            let (status, answer) = fake.call(&key, "POST", &format!("/sandboxes/{id}/{back}"), json!({})).await;
            assert!(status < 300, "{back}: {status} {answer}");
            if !went {
                break;
            }
            steps += 1;
        }
        assert!((3..MAX_STEPS).contains(&steps), "{forth}: {steps}");
        fake.call(&key, "POST", &format!("/sandboxes/{id}/{forth}"), json!({})).await;
    }
    // And the end.
    while fake.drop_after(0, Fake::ask(&key, "DELETE", &format!("/sandboxes/{id}"), &Value::Null)).await {
        until("its end", || fake.world.fleet().vms.is_empty() && fake.gateway.0.sandboxes.get(&id).is_none()).await;
    }
}

#[tokio::test]
async fn a_vm_whose_making_fails_anywhere_is_stopped() {
    let fake = Fake::new();
    let key = fake.key("one");
    let parent = fake.sandbox(&key, Value::Null).await;
    for lost in [" fork", " ttl", "GET vm"] {
        for (path, body) in [
            ("/sandboxes".to_owned(), json!({ "templateID": "base" })),
            (format!("/sandboxes/{parent}/fork"), json!({ "count": 2 })),
        ] {
            fake.world.fleet().lost = Some(lost.to_owned());
            let (status, answer) = fake.call(&key, "POST", &path, body).await;
            let is_refused = status == 500 || answer[0]["error"]["code"] == 500 && answer[1]["error"]["code"] == 500;
            assert!(is_refused, "{lost}: {status} {answer}");
            fake.world.fleet().lost = None;
            until("all others have gone", || fake.world.fleet().vms.keys().eq([&parent])).await;
            assert_eq!(fake.gateway.0.sandboxes.list().len(), 1, "{lost}");
        }
    }
}
