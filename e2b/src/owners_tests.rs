//! Owners are separate, and neither learns of the other. And each has quotas.

use axum::http::StatusCode;
use clade_test_support::Watchdog;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::call_permits::MAX_PERMITS;
use crate::connection_limits::MAX_CALLS;
use crate::listen::accept_at_most;
use crate::quotas::Quotas;
use crate::source::SNAPSHOT_PREFIX;
use crate::testing::{Fake, LIMIT, until};

async fn snapshot(fake: &Fake, key: &str, id: &str, name: &str) -> (u16, Value) {
    fake.call(key, "POST", &format!("/sandboxes/{id}/snapshots"), json!({ "name": name })).await
}

fn ids(list: &Value, field: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|one| one[field].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_snapshots_name_is_its_owners_and_takes_none_of_the_hosts() {
    let fake = Fake::new();
    let (one, two) = (fake.key("one"), fake.key("two"));
    let (of_one, of_two) = (fake.sandbox(&one, Value::Null).await, fake.sandbox(&two, Value::Null).await);
    for (key, id) in [(&one, &of_one), (&two, &of_two)] {
        for name in ["kept", "image-0123456789abcdef"] {
            let (status, taken) = snapshot(&fake, key, id, name).await;
            assert_eq!((status, &taken["snapshotID"]), (201, &json!(name)), "{taken}");
            assert_eq!(snapshot(&fake, key, id, name).await.0, 409, "{name} is taken");
        }
        for taken in ["base", "base:default"] {
            assert_eq!(snapshot(&fake, key, id, taken).await.0, 409, "{taken}");
        }
        for wrong in ["a/b", "", "..", "%6bept", "a b", &format!("{SNAPSHOT_PREFIX}0")] {
            assert!([400, 409].contains(&snapshot(&fake, key, id, wrong).await.0), "{wrong}");
        }
    }
    let names: Vec<String> = fake.world.supervisor_state().checkpoints.keys().cloned().collect();
    assert!(names.iter().all(|name| name == "base" || name.starts_with(SNAPSHOT_PREFIX)), "{names:?}");
    assert_eq!(names.len(), 5);
    // A checkpoint of a snapshot whose record is not there yet, or no longer.
    let bare = format!("{SNAPSHOT_PREFIX}00");
    fake.world.supervisor_state().checkpoints.insert(bare.clone(), false);
    for key in [&one, &two] {
        let (_, templates) = fake.call(key, "GET", "/templates", Value::Null).await;
        assert_eq!(ids(&templates, "templateID"), ["base", "image-0123456789abcdef", "kept"], "{templates}");
        let (status, made) = fake.call(key, "POST", "/sandboxes", json!({ "templateID": bare })).await;
        assert_eq!(status, 404, "{made}");
        assert_eq!(fake.call(key, "DELETE", &format!("/templates/{bare}"), Value::Null).await.0, 404);
    }
    // Each makes a sandbox of its own snapshot, and removes only that.
    let made = fake.sandbox(&two, json!({ "templateID": "kept" })).await;
    let parent = fake.world.supervisor_state().vms[&made].parent.clone();
    assert_eq!(fake.gateway.0.snapshots.get(&parent).unwrap().get().owner, "two");
    assert_eq!(fake.call(&one, "DELETE", "/templates/kept", Value::Null).await.0, 204);
    assert_eq!(fake.call(&one, "POST", "/sandboxes", json!({ "templateID": "kept" })).await.0, 404);
    assert_eq!(fake.call(&one, "POST", "/sandboxes", json!({ "templateID": parent })).await.0, 404);
    fake.sandbox(&two, json!({ "templateID": parent })).await;
    assert_eq!(ids(&fake.call(&two, "GET", "/snapshots", Value::Null).await.1, "snapshotID").len(), 2);
}

#[tokio::test]
async fn a_network_that_the_templates_owner_closed_is_never_opened() {
    let fake = Fake::new();
    fake.world.supervisor_state().checkpoints.insert("shut".to_owned(), true);
    let key = fake.key("one");
    let is_closed = |id: &str| fake.world.supervisor_state().vms[id].is_closed;
    let put = |id: &str, rules: Value| {
        let (fake, key, id) = (&fake, &key, id.to_owned());
        async move { fake.call(key, "PUT", &format!("/sandboxes/{id}/network"), rules).await.0 }
    };
    for asked in [json!({}), json!({ "allow_internet_access": true }), json!({ "allow_internet_access": false })] {
        let asked = [asked, json!({ "templateID": "shut" })].into_iter().fold(json!({}), |mut all, more| {
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            all
        });
        let id = fake.sandbox(&key, asked.clone()).await;
        let (_, forked) = fake.call(&key, "POST", &format!("/sandboxes/{id}/fork"), json!({})).await;
        let child = forked[0]["sandbox"]["sandboxID"].as_str().unwrap().to_owned();
        let (_, taken) = fake.call(&key, "POST", &format!("/sandboxes/{id}/snapshots"), json!({})).await;
        let again = json!({ "templateID": taken["snapshotID"], "allow_internet_access": true });
        let of_snapshot = fake.sandbox(&key, again).await;
        for id in [&id, &child, &of_snapshot] {
            for rules in [json!({}), json!({ "allow_internet_access": true }), json!({ "denyOut": ["10.0.0.0/8"] })] {
                assert!(is_closed(id), "{asked}");
                assert_eq!(put(id, rules.clone()).await, 204);
                assert!(is_closed(id), "{asked} {rules}");
            }
        }
    }
    // The sandbox's owner may open a network that the same owner has closed.
    let id = fake.sandbox(&key, json!({ "allow_internet_access": false })).await;
    assert!(is_closed(&id));
    let (_, taken) = fake.call(&key, "POST", &format!("/sandboxes/{id}/snapshots"), json!({})).await;
    assert_eq!(put(&id, json!({})).await, 204);
    assert!(!is_closed(&id));
    let again = json!({ "templateID": taken["snapshotID"], "allow_internet_access": true });
    assert!(!is_closed(&fake.sandbox(&key, again).await));
}

#[tokio::test]
async fn a_template_that_is_replaced_while_a_create_waits_closes_the_sandboxs_network() {
    let fake = Fake::new();
    let key = fake.key("one");
    let is_closed = |id: &str| fake.world.supervisor_state().vms[id].is_closed;
    for asked in [json!(null), json!(true), json!(false)] {
        fake.world.supervisor_state().checkpoints.insert("base".to_owned(), false);
        fake.world.hold(" fork");
        let create = fake.sandbox(&key, json!({ "allow_internet_access": asked }));
        let replace = async {
            fake.world.until_held().await;
            fake.world.supervisor_state().checkpoints.insert("base".to_owned(), true);
            fake.world.release();
        };
        let (id, ()) = tokio::join!(create, replace);
        assert!(is_closed(&id), "{asked}");
        let path = format!("/sandboxes/{id}/network");
        assert_eq!(fake.call(&key, "PUT", &path, json!({ "allow_internet_access": true })).await.0, 204);
        assert!(is_closed(&id), "{asked}");
    }
}

#[tokio::test]
async fn an_owner_has_no_more_than_its_quotas_whatever_is_asked_for_at_once() {
    let fake = Fake::with(Quotas { sandboxes: 4, memory_mib: 5 * 64, snapshots: 2 });
    let (one, two) = (fake.key("one"), fake.key("two"));
    let many = StatusCode::TOO_MANY_REQUESTS.as_u16();
    let body = json!({ "templateID": "base", "timeout": 300 });
    fake.world.hold(" fork");
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..10 {
        let request = Fake::ask(&one, "POST", "/sandboxes", &body);
        let router = fake.router.clone();
        calls.spawn(async move { tower::ServiceExt::oneshot(router, request).await.unwrap().status().as_u16() });
    }
    until("four to be made", || {
        fake.world.supervisor_state().log.iter().filter(|what| what.ends_with(" fork")).count() >= 4
    })
    .await;
    fake.world.release();
    let mut statuses = calls.join_all().await;
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 201, 201, 201, many, many, many, many, many, many]);
    assert_eq!(fake.world.supervisor_state().vms.len(), 4);
    let all = ids(&fake.call(&one, "GET", "/v2/sandboxes", Value::Null).await.1, "sandboxID");
    // Paused sandboxes and forks count, and another owner has separate quotas.
    assert_eq!(fake.call(&one, "POST", &format!("/sandboxes/{}/pause", all[0]), json!({})).await.0, 204);
    assert_eq!(fake.call(&one, "POST", "/sandboxes", body.clone()).await.0, many);
    assert_eq!(fake.call(&one, "POST", &format!("/sandboxes/{}/fork", all[1]), json!({})).await.0, many);
    fake.sandbox(&two, Value::Null).await;
    // Five times 64 MiB: a snapshot counts with its sandbox's memory.
    assert_eq!(snapshot(&fake, &one, &all[1], "a").await.0, 201);
    let (status, refused) = snapshot(&fake, &one, &all[1], "b").await;
    assert!(status == many && refused["message"].as_str().unwrap().contains("384 MiB"), "{refused}");
    // The quota of a sandbox that ends is released.
    for id in &all[..2] {
        assert_eq!(fake.call(&one, "DELETE", &format!("/sandboxes/{id}"), Value::Null).await.0, 204);
    }
    assert_eq!(fake.call(&one, "POST", &format!("/sandboxes/{}/fork", all[2]), json!({ "count": 3 })).await.0, many);
    assert_eq!(snapshot(&fake, &one, &all[2], "b").await.0, 201);
    let (status, refused) = snapshot(&fake, &one, &all[2], "c").await;
    assert!(status == many && refused["message"].as_str().unwrap().contains("3 snapshots"), "{refused}");
    fake.sandbox(&one, Value::Null).await;
    assert_eq!(fake.call(&one, "POST", "/sandboxes", body).await.0, many);
}

#[tokio::test]
async fn metadata_and_variables_have_bounds() {
    let fake = Fake::new();
    let key = fake.key("one");
    let pairs = |count: usize, length: usize| -> Value {
        (0..count)
            .map(|n| (format!("{n:04}"), Value::String("x".repeat(length))))
            .collect::<serde_json::Map<_, _>>()
            .into()
    };
    for (field, texts, status) in [
        ("metadata", pairs(256, 60), 201),
        ("metadata", pairs(257, 0), 400),
        ("metadata", pairs(1, 16 << 10), 400),
        ("envVars", pairs(256, 250), 201),
        ("envVars", pairs(257, 0), 400),
        ("envVars", pairs(1, 64 << 10), 400),
    ] {
        let (got, answer) = fake.call(&key, "POST", "/sandboxes", json!({ "templateID": "base", field: texts })).await;
        assert_eq!(got, status, "{field}: {answer}");
        assert!(status == 201 || answer["message"].as_str().unwrap().starts_with(field), "{answer}");
    }
}

#[tokio::test]
async fn idle_connections_without_a_key_keep_nobody_out() {
    const MOST: usize = 8;
    let fake = Fake::new();
    let key = fake.key("one");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(accept_at_most(MOST, listener, fake.router.clone(), None));
    let ask = async |head: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    };
    let status = async |stream: &mut TcpStream| {
        let mut bytes = [0; 12];
        stream.read_exact(&mut bytes).await.unwrap();
        String::from_utf8_lossy(&bytes[9..]).into_owned()
    };
    let _watchdog = Watchdog::new(LIMIT, || "a connection waits".to_owned());
    // A connection with a call in progress stays, however many others come.
    fake.world.hold("GET checkpoints");
    let mut under_way = ask(&format!("GET /templates HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n\r\n")).await;
    fake.world.until_held().await;
    let mut idle = Vec::new();
    for n in 0..3 * MOST {
        // Idle, with half a request, with a wrong key, or for an unknown sandbox.
        let head = ["", "GET /v2/sandb", "GET /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: e2b_x\r\n\r\n"];
        idle.push(ask(head[n % 3]).await);
        let mut health = ask("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert_eq!(status(&mut health).await, "204");
        idle.push(health);
    }
    let mut calls = ask(&format!("GET /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\n\r\n")).await;
    assert_eq!(status(&mut calls).await, "200");
    fake.world.release();
    assert_eq!(status(&mut under_way).await, "200");
}

#[tokio::test]
async fn an_owner_whose_calls_hang_has_so_many_and_no_more() {
    let fake = Fake::new();
    let (one, two) = (fake.key("one"), fake.key("two"));
    fake.world.hold("GET checkpoints");
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..MAX_CALLS {
        let request = Fake::ask(&one, "GET", "/templates", &Value::Null);
        calls.spawn(tower::ServiceExt::oneshot(fake.router.clone(), request));
    }
    let asked = || fake.world.supervisor_state().log.iter().filter(|what| *what == "GET checkpoints").count();
    until("as many as have permits", || asked() == MAX_PERMITS).await;
    until("the others to wait", || fake.gateway.0.calls.calls_of("one") == MAX_CALLS).await;
    assert_eq!(asked(), MAX_PERMITS);
    let (status, refused) = fake.call(&one, "GET", "/v2/sandboxes", Value::Null).await;
    assert_eq!(status, 429, "{refused}");
    assert_eq!(fake.call(&two, "GET", "/v2/sandboxes", Value::Null).await.0, 200);
    // Calls of clients that go, and calls that are answered.
    calls.abort_all();
    while calls.join_next().await.is_some() {}
    fake.world.release();
    assert_eq!(fake.call(&one, "GET", "/v2/sandboxes", Value::Null).await.0, 200);
}

/// A pause writes a VM's memory to a disk. It goes on without its client.
#[tokio::test]
async fn changes_whose_clients_have_gone_keep_their_permits() {
    let fake = Fake::new();
    let (one, two) = (fake.key("one"), fake.key("two"));
    let mut sandboxes = Vec::new();
    for _ in 0..MAX_PERMITS + 8 {
        sandboxes.push(fake.sandbox(&one, json!({})).await);
    }
    let other = fake.sandbox(&two, json!({})).await;
    fake.world.hold(" pause");
    let pauses = || fake.world.supervisor_state().log.iter().filter(|what| what.ends_with(" pause")).count();
    let pause = |id: &String| {
        let request = Fake::ask(&one, "POST", &format!("/sandboxes/{id}/pause"), &json!({}));
        tokio::spawn(tower::ServiceExt::oneshot(fake.router.clone(), request))
    };
    let begun: Vec<_> = sandboxes[..MAX_PERMITS].iter().map(pause).collect();
    until("as many as have permits", || pauses() == MAX_PERMITS).await;
    for call in begun {
        call.abort();
        drop(call.await);
    }
    let waiting: Vec<_> = sandboxes[MAX_PERMITS..].iter().map(pause).collect();
    until("the others to wait", || fake.gateway.0.calls.calls_of("one") == MAX_PERMITS + 8).await;
    assert_eq!(fake.call(&two, "DELETE", &format!("/sandboxes/{other}"), Value::Null).await.0, 204);
    assert_eq!(pauses(), MAX_PERMITS, "their changes have not ended");
    fake.world.release();
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap().status(), 204);
    }
    until("all to pause", || sandboxes.iter().all(|id| fake.gateway.0.sandboxes.get(id).unwrap().get().paused)).await;
}
