//! Calls beside a supervisor that is a task of the test.

use serde_json::json;
use tower::ServiceExt;

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
    // The last was answered. The first two were cancelled: before their fork, and in it.
    let made = steps + 1 - 2;
    let parent = fake.sandbox(&key, Value::Null).await;
    let (path, body) = (format!("/sandboxes/{parent}/fork"), json!({ "count": 3, "timeout": 300 }));
    let mut forks = 0;
    while fake.drop_after(forks, Fake::ask(&key, "POST", &path, &body)).await {
        forks += 1;
    }
    assert!(forks >= 4, "{forks}");
    let made = made + 1 + (forks + 1 - 1) * 3;
    until("all VMs have a record and an end", || {
        let supervisor_state = fake.world.supervisor_state();
        let records = fake.gateway.0.sandboxes.list();
        let is_so = supervisor_state
            .vms
            .iter()
            .all(|(name, vm)| vm.ttl == Some(300.0) && records.iter().any(|one| one.id == *name));
        is_so && supervisor_state.vms.len() == records.len() && records.len() == made
    })
    .await;
    fake.gateway.changes_ended().await;
    let records = fake.gateway.0.sandboxes.list();
    assert_eq!((records.len(), fake.world.supervisor_state().vms.len()), (made, made));
}

#[tokio::test]
async fn forks_and_snapshots_are_made_once_for_a_key() {
    let fake = Fake::new();
    let key = fake.key("one");
    let id = fake.sandbox(&key, Value::Null).await;
    let (_, taken) = fake.call(&key, "POST", &format!("/sandboxes/{id}/snapshots"), json!({})).await;
    let of_snapshot = format!("/snapshots/{}/fork", taken["snapshotID"].as_str().unwrap());
    let count = || {
        let supervisor_state = fake.world.supervisor_state();
        (supervisor_state.vms.len(), supervisor_state.checkpoints.len())
    };
    for (path, body, step, more) in [
        (format!("/sandboxes/{id}/fork"), json!({ "count": 2 }), 0, (2, 0)),
        (of_snapshot, json!({ "count": 3 }), 1, (3, 0)),
        (format!("/sandboxes/{id}/snapshots"), json!({ "name": "kept" }), 1, (0, 1)),
    ] {
        let before = count();
        let ask = |body: &Value| {
            let mut request = Fake::ask(&key, "POST", &path, body);
            request.headers_mut().insert("idempotency-key", path.parse().unwrap());
            request
        };
        // The first client goes while the supervisor forks the VM, or keeps its checkpoint.
        assert!(fake.drop_after(step, ask(&body)).await, "{path}");
        fake.gateway.changes_ended().await;
        let made = (before.0 + more.0, before.1 + more.1);
        assert_eq!(count(), made, "{path}");
        let ((status, first), (_, again)) = (fake.request(ask(&body)).await, fake.request(ask(&body)).await);
        assert_eq!((status, &again, count()), (201, &first, made), "{path}: {first}");
        assert_eq!(fake.request(ask(&json!({ "name": "other" }))).await.0, 422, "{path}");
        assert_eq!(fake.call(&key, "POST", &path, json!({})).await.0, 201, "without the key");
        assert!(count() > made, "{path}");
    }
}

#[tokio::test]
async fn a_client_that_may_repeat_its_call_gets_the_sandbox_of_the_first() {
    let fake = Fake::new();
    let key = fake.key("one");
    // Before its fork, and in it.
    for steps in [0, 1] {
        let ask = || {
            let mut request = Fake::ask(&key, "POST", "/sandboxes", &json!({ "templateID": "base", "timeout": 300 }));
            request.headers_mut().insert("idempotency-key", steps.to_string().parse().unwrap());
            request
        };
        assert!(fake.drop_after(steps, ask()).await);
        fake.gateway.changes_ended().await;
        let (status, made) = fake.request(ask()).await;
        let vms = fake.world.supervisor_state().vms.len();
        let log = fake.world.supervisor_state().log.clone();
        let forks = log.iter().filter(|what| what.ends_with(" fork")).count();
        assert_eq!((status, vms, forks), (201, steps + 1, steps + 1), "{made}");
        assert!(fake.world.supervisor_state().vms.contains_key(made["sandboxID"].as_str().unwrap()), "{made}");
    }
}

#[tokio::test]
async fn a_fork_that_waits_delays_no_change_but_those_of_the_network() {
    let fake = Fake::new();
    let key = fake.key("one");
    let (id, other) = (fake.sandbox(&key, Value::Null).await, fake.sandbox(&key, Value::Null).await);
    let begin = |id: &str, action: &str, body: &Value| {
        let request = Fake::ask(
            &key,
            if action == "network" { "PUT" } else { "POST" },
            &format!("/sandboxes/{id}/{action}"),
            body,
        );
        tokio::spawn(fake.router.clone().oneshot(request))
    };
    fake.world.hold(" fork");
    let forks = [&id, &other].map(|id| begin(id, "fork", &json!({})));
    until("both forks", || {
        fake.world.supervisor_state().log.iter().filter(|what| what.ends_with(" fork")).count() == 2
    })
    .await;
    let network = begin(&id, "network", &json!({ "allow_internet_access": false }));
    for (action, body) in [("pause", json!({})), ("connect", json!({})), ("timeout", json!({ "timeout": 60 }))] {
        let (status, answer) = fake.call(&key, "POST", &format!("/sandboxes/{id}/{action}"), body).await;
        assert!(status < 300, "{action}: {status} {answer}");
    }
    assert_eq!(fake.call(&key, "DELETE", &format!("/sandboxes/{other}"), Value::Null).await.0, 204);
    assert!(!network.is_finished() && !fake.world.supervisor_state().log.iter().any(|what| what.ends_with(" network")));
    fake.world.release();
    let [forked, gone] = forks;
    assert_eq!(
        (forked.await.unwrap().unwrap().status().as_u16(), gone.await.unwrap().unwrap().status().as_u16()),
        (201, 404)
    );
    assert_eq!(network.await.unwrap().unwrap().status().as_u16(), 204);
    let child = fake.gateway.0.sandboxes.such(|one| one.id != id).pop().unwrap();
    let closed: Vec<bool> = [&id, &child.id].map(|id| fake.world.supervisor_state().vms[id].is_closed).into();
    assert_eq!((closed, child.network.is_allowed), (vec![true, false], None), "the fork came first");
}

#[tokio::test]
async fn the_end_waits_for_vms_without_a_record() {
    let fake = Fake::new();
    let key = fake.key("one");
    fake.gateway.changes_ended().await;
    // Whether the call succeeds or fails after its fork, and is held before or after it.
    for (steps, lost) in [(0, None), (2, None), (1, Some(" fork")), (2, Some(" ttl")), (3, Some("GET vm"))] {
        fake.world.supervisor_state().lost = lost.map(str::to_owned);
        let so_far = fake.world.supervisor_state().log.len();
        fake.world.supervisor_state().hold_after = Some(so_far + steps);
        let body = json!({ "templateID": "base", "timeout": 300 });
        let call = tokio::spawn(fake.router.clone().oneshot(Fake::ask(&key, "POST", "/sandboxes", &body)));
        fake.world.until_held().await;
        let gateway = fake.gateway.clone();
        let end = tokio::spawn(async move { gateway.changes_ended().await });
        // Its client goes; the change does not.
        call.abort();
        let _ = call.await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!end.is_finished(), "after {steps} steps");
        fake.world.release();
        end.await.unwrap();
        let records = fake.gateway.0.sandboxes.list();
        let vms: Vec<String> = fake.world.supervisor_state().vms.keys().cloned().collect();
        assert!(vms.iter().all(|vm| records.iter().any(|one| one.id == *vm)), "{vms:?} after {steps} steps");
    }
}

#[tokio::test]
async fn a_client_that_goes_leaves_no_record_that_contradicts_its_vm() {
    let fake = Fake::new();
    let key = fake.key("one");
    let id = fake.sandbox(&key, Value::Null).await;
    let is_one = |is_paused: bool| {
        let (vm, record) =
            (fake.world.supervisor_state().vms[&id].clone(), fake.gateway.0.sandboxes.get(&id).unwrap().get());
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
    // And its end.
    while fake.drop_after(0, Fake::ask(&key, "DELETE", &format!("/sandboxes/{id}"), &Value::Null)).await {
        until("its end", || {
            fake.world.supervisor_state().vms.is_empty() && fake.gateway.0.sandboxes.get(&id).is_none()
        })
        .await;
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
            fake.world.supervisor_state().lost = Some(lost.to_owned());
            let (status, answer) = fake.call(&key, "POST", &path, body).await;
            let is_refused = status == 500 || answer[0]["error"]["code"] == 500 && answer[1]["error"]["code"] == 500;
            assert!(is_refused, "{lost}: {status} {answer}");
            fake.world.supervisor_state().lost = None;
            until("all others have gone", || fake.world.supervisor_state().vms.keys().eq([&parent])).await;
            assert_eq!(fake.gateway.0.sandboxes.list().len(), 1, "{lost}");
        }
    }
}

#[tokio::test]
async fn a_key_that_reads_sees_what_is_its_owners_and_opens_nothing() {
    let fake = Fake::new();
    let [one, two] = ["one", "two"].map(|name| fake.key(name));
    let reads = fake.key_of("watch", Some("one"), Scope::Read);
    let writes = fake.key_of("more", Some("one"), Scope::All);
    let id = fake.sandbox(&one, json!({ "metadata": { "a": "b" } })).await;
    let path = format!("/sandboxes/{id}");
    let token = fake.gateway.token(&id);
    for (path, answers) in [
        (path.clone(), true),
        ("/sandboxes".to_owned(), true),
        ("/v2/sandboxes".to_owned(), true),
        (format!("{path}/logs"), true),
        (format!("/sandboxes/metrics?sandbox_ids={id}"), true),
    ] {
        let (status, answer) = fake.call(&reads, "GET", &path, Value::Null).await;
        assert_eq!(status == 200, answers, "{path}: {answer}");
        assert!(!answer.to_string().contains(&token) && !answer.to_string().contains("ccessToken"), "{path}: {answer}");
    }
    assert_eq!(fake.call(&reads, "GET", "/v2/sandboxes", Value::Null).await.1[0]["sandboxID"], id.as_str());
    for (method, path) in
        [("POST", format!("{path}/connect")), ("POST", "/sandboxes".to_owned()), ("DELETE", path.clone())]
    {
        assert_eq!(fake.call(&reads, method, &path, json!({})).await.0, 403, "{method} {path}");
    }
    // Another key of the owner has the token; another owner's key finds no sandbox.
    assert_eq!(fake.call(&writes, "GET", &path, Value::Null).await.1["envdAccessToken"], token.as_str());
    assert_eq!(fake.call(&two, "GET", &path, Value::Null).await.0, 404);
    assert_eq!(fake.call(&writes, "DELETE", &path, Value::Null).await.0, 204);
}

#[tokio::test]
async fn only_the_token_of_a_paused_sandbox_wakes_it_by_its_agent() {
    let fake = Fake::new();
    let key = fake.key("one");
    let lifecycle = json!({ "autoPause": true, "autoResume": { "enabled": true } });
    let (id, other) = (fake.sandbox(&key, lifecycle).await, fake.sandbox(&key, Value::Null).await);
    assert_eq!(fake.call(&key, "POST", &format!("/sandboxes/{id}/pause"), json!({})).await.0, 204);
    let record = || fake.gateway.0.sandboxes.get(&id).unwrap().get();
    let (before, tokens) = (record(), [&id, &other].map(|id| fake.gateway.token(id)));
    let ask = |tokens: &[&str], path: &str| {
        let request = Request::get(path).header("e2b-sandbox-id", &id);
        let with = |request: axum::http::request::Builder, token: &&str| request.header("x-access-token", *token);
        fake.request(tokens.iter().fold(request, with).body(axum::body::Body::empty()).unwrap())
    };
    for wrong in [&[][..], &["x"], &[""], &[&tokens[1]], &[&tokens[0], &tokens[0]], &[&tokens[0][1..]]] {
        for path in ["/envs", "/health", "/files?path=/a&signature=v1_x"] {
            assert_eq!(ask(wrong, path).await.0, 502, "{wrong:?} {path}");
        }
    }
    assert_eq!(record(), before);
    assert!(fake.world.supervisor_state().vms[&id].is_paused);
    assert_eq!(ask(&[&tokens[0]], "/envs").await, (200, Value::String(id.clone())));
    assert!(!record().paused);
    // And then the agent requires it.
    assert_eq!(ask(&["x"], "/envs").await.0, 401);
}

/// A wake goes on without its client: each would hold up the owner's changes.
#[tokio::test]
async fn requests_at_a_time_wake_a_paused_sandbox_once() {
    let fake = Fake::new();
    let key = fake.key("one");
    let id = fake.sandbox(&key, json!({ "autoResume": { "enabled": true } })).await;
    assert_eq!(fake.call(&key, "POST", &format!("/sandboxes/{id}/pause"), json!({})).await.0, 204);
    let record = || fake.gateway.0.sandboxes.get(&id).unwrap().get();
    let before = fake.world.supervisor_state().log.len();
    fake.world.hold(&format!("{id} resume"));
    let token = fake.gateway.token(&id);
    let ask = || {
        let request = Request::get("/envs").header("e2b-sandbox-id", &id).header("x-access-token", &token);
        fake.request(request.body(axum::body::Body::empty()).unwrap())
    };
    let (mut first, mut second) = (std::pin::pin!(ask()), std::pin::pin!(ask()));
    tokio::select! {
        biased;
        answer = &mut first => panic!("{answer:?}"),
        answer = &mut second => panic!("{answer:?}"),
        () = fake.world.until_held() => {}
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fake.world.supervisor_state().log.len(), before + 1);
    fake.world.release();
    assert_eq!(first.await.0, 200);
    let woken = record();
    assert_eq!(second.await.0, 200);
    // A resume of a running sandbox prolongs its time.
    assert_eq!(record(), woken);
}

#[tokio::test]
async fn no_spelling_of_another_owners_snapshot_makes_a_sandbox_of_it() {
    let fake = Fake::new();
    let (one, two) = (fake.key("one"), fake.key("two"));
    let id = fake.sandbox(&one, Value::Null).await;
    let (status, taken) =
        fake.call(&one, "POST", &format!("/sandboxes/{id}/snapshots"), json!({ "name": "kept" })).await;
    assert_eq!((status, &taken["snapshotID"]), (201, &json!("kept")), "{taken}");
    let checkpoints: Vec<String> = fake.world.supervisor_state().checkpoints.keys().cloned().collect();
    let vms = fake.world.supervisor_state().vms.len();
    for name in ["kept", "kept:default"]
        .into_iter()
        .chain(checkpoints.iter().map(String::as_str))
        .filter(|name| *name != "base")
    {
        for spelling in [
            name.to_owned(),
            format!("{name}:default"),
            name.replacen('k', "%6b", 1),
            name.replacen('e', "%65", 1),
            name.replacen('e', "%2565", 1),
            format!("{name}?"),
            format!("{name}#"),
            format!("{name} "),
            format!("{name}/"),
            format!("./{name}"),
            format!("x/../{name}"),
            format!("{name}\0"),
        ] {
            let (status, answer) = fake.call(&two, "POST", "/sandboxes", json!({ "templateID": spelling })).await;
            assert_eq!(status, 404, "{spelling:?}: {answer}");
            let path = format!("/templates/{}", spelling.replace(['?', '#', ' ', '\0'], "%20"));
            let (status, answer) = fake.call(&two, "DELETE", &path, Value::Null).await;
            assert!([404, 405].contains(&status), "{spelling:?}: {answer}");
        }
    }
    assert_eq!(fake.world.supervisor_state().vms.len(), vms);
    assert_eq!(fake.call(&one, "POST", "/sandboxes", json!({ "templateID": "kept" })).await.0, 201);
}
