//! The beginning of a sandbox's time, beside a supervisor and an agent that are tasks of the test.

use std::sync::Mutex;

use axum::extract::{Json, Path, State};
use axum::routing::{get, post, put};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use super::*;
use crate::gateway::Options;

/// The requests in their order.
type Log = Arc<Mutex<Vec<String>>>;

fn logged(log: &Log) -> Vec<String> {
    log.lock().unwrap().clone()
}

/// A supervisor that forks `ibox`, whose agent is behind `socket`.
fn supervise(listener: UnixListener, socket: &std::path::Path, log: &Log) {
    let vm = json!({
        "name": "ibox", "pid": 1, "state": "running", "parent": null, "generation": 1, "cpus": 1, "age_s": 0.0,
        "memory": null, "vsock": { "cid": 3, "socket": socket },
    });
    let forked = json!({
        "children": ["ibox"], "pause_us": 0.0, "freeze_us": 0.0, "total_us": 0.0, "remapped_pages": 0,
        "copied_pages": 0,
    });
    let checkpoint = json!({
        "name": "base", "vm": null, "generation": 1, "cpus": 1, "mib": 64, "age_s": 0.0, "descriptors": 1,
        "pause_us": 0.0,
    });
    let resumed = vm.clone();
    let router = axum::Router::new()
        .route("/v1/checkpoints/{name}", get(async move || Json(checkpoint)))
        .route("/v1/checkpoints/{name}/fork", post(async move || Json(forked)))
        .route("/v1/vms/{name}", get(async move || Json(vm)))
        .route("/v1/vms/{name}/resume", post(async move || Json(resumed)))
        .route(
            "/v1/vms/{name}/ttl",
            put(async |State(log): State<Log>, Path(_): Path<String>, Json(ttl): Json<Value>| {
                log.lock().unwrap().push(format!("ttl {}", ttl["seconds"]));
                Json(json!({ "seconds_left": ttl["seconds"] }))
            }),
        )
        .with_state(Arc::clone(log));
    tokio::spawn(async move { axum::serve(listener, router).await });
}

/// An agent that answers one request for each permit.
fn answer_for_agent(listener: UnixListener, log: &Log, permits: Arc<Semaphore>) {
    let log = Arc::clone(log);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut text = String::new();
            let mut read = async |stream: &mut tokio::net::UnixStream, end: &str| {
                text.clear();
                while !text.ends_with(end) {
                    text.push(stream.read_u8().await.unwrap().into());
                }
                text.clone()
            };
            assert_eq!(read(&mut stream, "\n").await, "CONNECT 49983\n");
            stream.write_all(b"OK 1024\n").await.unwrap();
            assert!(read(&mut stream, "}").await.starts_with("POST /init "));
            log.lock().unwrap().push("init".to_owned());
            permits.acquire().await.unwrap().forget();
            log.lock().unwrap().push("initialised".to_owned());
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        }
    });
}

async fn until(log: &Log, last: &str) {
    while logged(log).last().is_none_or(|event| event != last) {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn the_time_of_a_sandbox_begins_when_its_guest_is_initialised() {
    let limit = std::time::Duration::from_secs(120);
    let _watchdog = clade_test_support::Watchdog::new(limit, || "a sandbox is made".to_owned());
    let dir = tempfile::tempdir().unwrap();
    let (run, socket) = (dir.path().join("run"), dir.path().join("vsock"));
    std::fs::create_dir(&run).unwrap();
    let options = Options {
        dir: run.clone(),
        keys: dir.path().join("keys.json"),
        domain: None,
        templates: None,
        snapshots: None,
        quotas: crate::Quotas::default(),
    };
    let gateway = Gateway::of_socket(options).unwrap();
    let (log, permits) = (Log::default(), Arc::new(Semaphore::new(0)));
    let supervisor = clade_api::supervisor_path(&run);
    supervise(UnixListener::bind(supervisor).unwrap(), &socket, &log);
    answer_for_agent(UnixListener::bind(&socket).unwrap(), &log, Arc::clone(&permits));

    let new: NewSandbox = serde_json::from_value(json!({ "templateID": "base", "timeout": 2 })).unwrap();
    let making = gateway.clone();
    let made = tokio::spawn(async move { making.create("one", new, ChangeClient::repeating()).await });
    until(&log, "init").await;
    let ready = Timestamp::now();
    permits.add_permits(1);
    let sandbox = made.await.unwrap().unwrap();
    assert_eq!(logged(&log), ["ttl 602.0", "init", "initialised", "ttl 2.0"]);
    let entry = gateway.0.sandboxes.get(&sandbox.id).unwrap();
    let record = entry.get();
    assert!(record.started_at >= ready && record.end_at >= after(ready, 2).unwrap(), "{record:?}");

    // The same for a resumed one.
    gateway.0.sandboxes.change(&entry, |record| record.paused = true);
    log.lock().unwrap().clear();
    let (waking, woken) = (gateway.clone(), Arc::clone(&entry));
    let resumed = tokio::spawn(async move { waking.resume(&woken, Some(3), None, None).await });
    until(&log, "init").await;
    let ready = Timestamp::now();
    permits.add_permits(1);
    assert!(resumed.await.unwrap().unwrap().1);
    assert_eq!(logged(&log), ["ttl 603.0", "init", "initialised", "ttl 3.0"]);
    assert!(entry.get().end_at >= after(ready, 3).unwrap());
}

/// Hundreds of paused sandboxes must not stop a create: the bound for running VMs counts them.
#[test]
fn quotas_and_not_processors_bound_sandboxes() {
    let request = request_for("sandbox".to_owned(), 1, "base").unwrap();
    assert!(request.overcommit && request.ready);
}
