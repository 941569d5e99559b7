//! Watches.

use std::os::fd::OwnedFd;

use clade_agent_client::proto::api::Generation;
use clade_agent_client::proto::filesystem::{EventType, WatchDirResponse, WatchRequest, Watcher, WatcherEvents};
use clade_agent_client::proto::process::Empty;
use clade_agent_client::proto::{Code, RpcError};
use clade_agent_client::{Client, ClientError, Messages};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::{Agent, run, until};

/// The agent's only inotify descriptor, if the watcher has not ended.
fn inotify_of(agent: &Agent) -> Option<OwnedFd> {
    let pid = agent.child.id();
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut found = entries
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link.to_str() == Some("anon_inode:inotify")));
    let number = found.next()?.file_name().to_str().unwrap().parse().unwrap();
    let agent = pidfd_open(Pid::from_child(&agent.child), PidfdFlags::empty()).unwrap();
    pidfd_getfd(agent, number, PidfdGetfdFlags::empty()).ok()
}

async fn wait_for(stream: &mut Messages<WatchDirResponse>, kind: EventType, name: &str) -> WatchDirResponse {
    loop {
        let message = stream.next().await.unwrap().expect("the watch goes on");
        if message.filesystem.as_ref().is_some_and(|event| event.kind == kind && event.name == name) {
            return message;
        }
    }
}

#[test]
fn what_happens_in_a_directory_is_told() {
    let agent = Agent::start();
    run(async {
        let dir = agent.path("dir");
        std::fs::create_dir_all(format!("{dir}/sub")).unwrap();
        let request =
            WatchRequest { path: dir.clone(), recursive: true, include_entry: true, ..WatchRequest::default() };
        let client = agent.client();
        let mut stream: Messages<WatchDirResponse> =
            client.stream("filesystem.Filesystem/WatchDir", &request, None).await.unwrap();
        assert!(stream.next().await.unwrap().unwrap().start.is_some());
        std::fs::write(format!("{dir}/sub/a"), "1").unwrap();
        let made = wait_for(&mut stream, EventType::Create, "sub/a").await.filesystem.unwrap();
        assert_eq!(made.entry.unwrap().path, format!("{dir}/sub/a"));
        wait_for(&mut stream, EventType::Write, "sub/a").await;
        std::fs::rename(format!("{dir}/sub/a"), format!("{dir}/b")).unwrap();
        let away = wait_for(&mut stream, EventType::Rename, "sub/a").await.filesystem.unwrap();
        assert_eq!(away.entry, None);
        wait_for(&mut stream, EventType::Create, "b").await;
        // In a new directory, immediately.
        std::fs::create_dir_all(format!("{dir}/new/deep")).unwrap();
        std::fs::write(format!("{dir}/new/deep/c"), "1").unwrap();
        wait_for(&mut stream, EventType::Create, "new/deep/c").await;
        std::fs::remove_file(format!("{dir}/b")).unwrap();
        wait_for(&mut stream, EventType::Remove, "b").await;
    });
}

#[test]
fn watchers_are_asked_for_what_has_happened() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let dir = agent.path("dir");
        std::fs::create_dir_all(format!("{dir}/sub")).unwrap();
        let request = WatchRequest { path: dir.clone(), ..WatchRequest::default() };
        let watcher: Watcher = client.call("filesystem.Filesystem/CreateWatcher", &request).await.unwrap();
        std::fs::write(format!("{dir}/a"), "1").unwrap();
        std::fs::write(format!("{dir}/sub/b"), "1").unwrap();
        let mut names = Vec::new();
        until("events", async || {
            let events: WatcherEvents = client.call("filesystem.Filesystem/GetWatcherEvents", &watcher).await.unwrap();
            names.extend(events.events.into_iter().map(|event| event.name));
            names.contains(&"a".to_owned())
        })
        .await;
        assert!(!names.contains(&"sub/b".to_owned()), "not recursive: {names:?}");
        client.call::<_, Empty>("filesystem.Filesystem/RemoveWatcher", &watcher).await.unwrap();
        let gone = client.call::<_, Empty>("filesystem.Filesystem/RemoveWatcher", &watcher).await.unwrap_err();
        assert!(matches!(&gone, ClientError::Rpc(error) if error.code == Code::NotFound));
        let missing = WatchRequest { path: "/nowhere".into(), ..WatchRequest::default() };
        let error = client.call::<_, Watcher>("filesystem.Filesystem/CreateWatcher", &missing).await.unwrap_err();
        assert!(matches!(&error, ClientError::Rpc(error) if error.code == Code::NotFound), "{error}");
    });
}

/// An empty directory, and a watcher of it that is polled.
async fn watched(agent: &Agent) -> (Client, String, Watcher) {
    let (client, dir) = (agent.client(), agent.path("dir"));
    std::fs::create_dir(&dir).unwrap();
    let request = WatchRequest { path: dir.clone(), ..WatchRequest::default() };
    let watcher = client.call("filesystem.Filesystem/CreateWatcher", &request).await.unwrap();
    (client, dir, watcher)
}

/// Until the watcher has ended, with its reason.
async fn end_of(client: &Client, watcher: &Watcher) -> RpcError {
    let mut end = None;
    until("the end of a watcher", async || {
        let events = client.call::<_, WatcherEvents>("filesystem.Filesystem/GetWatcherEvents", watcher).await;
        end = events.err();
        end.is_some()
    })
    .await;
    let Some(ClientError::Rpc(error)) = end else { panic!("{end:?}") };
    error
}

#[test]
fn a_large_directory_that_is_moved_to_a_watched_one_ends_the_watch_and_makes_room() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let (dir, large) = (agent.path("dir"), agent.path("large"));
        for dir in [&dir, &large] {
            std::fs::create_dir(dir).unwrap();
        }
        (0..17_000).for_each(|number| drop(std::fs::File::create(format!("{large}/{number:0100}")).unwrap()));
        // Entries from before the watch cause no event.
        let there = WatchRequest { path: large.clone(), recursive: true, ..WatchRequest::default() };
        let unmoved: Watcher = client.call("filesystem.Filesystem/CreateWatcher", &there).await.unwrap();
        let request = WatchRequest { path: dir.clone(), recursive: true, ..WatchRequest::default() };
        let watcher: Watcher = client.call("filesystem.Filesystem/CreateWatcher", &request).await.unwrap();
        std::fs::rename(&large, format!("{dir}/large")).unwrap();
        let error = end_of(&client, &watcher).await;
        assert!(error.message.contains("more than 16384 entries at a time"), "{error}");
        let events: WatcherEvents = client.call("filesystem.Filesystem/GetWatcherEvents", &unmoved).await.unwrap();
        assert!(events.events.len() < 10, "{} events", events.events.len());
        // All entries in one answer, which is of more than 4 MiB.
        assert_eq!(client.list_dir(&format!("{dir}/large")).await.unwrap().len(), 17_000);
        let flat = WatchRequest { path: dir.clone(), ..WatchRequest::default() };
        let make = async || client.call::<_, Watcher>("filesystem.Filesystem/CreateWatcher", &flat).await;
        // In place of the one that has ended, too.
        let (mut made, mut waits) = (1, 0);
        let full = loop {
            let error = match make().await {
                Ok(_) => {
                    made += 1;
                    continue;
                }
                Err(ClientError::Rpc(error)) => error,
                Err(error) => panic!("{error}"),
            };
            // The kernel's are as many as the agent's by default, and other tests and programs have some.
            let is_the_kernels = error.message.contains("os error 24");
            if !is_the_kernels || waits == 100 {
                break error;
            }
            waits += 1;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        assert_eq!(full.code, Code::ResourceExhausted, "{full}");
        if waits == 100 {
            return clade_test_support::skipped("other programs of this user have instances of inotify");
        }
        assert_eq!(made, 128, "{full}");
    });
}

#[test]
fn no_watcher_is_of_another_generation() {
    let agent = Agent::start();
    run(async {
        let (client, _, first) = watched(&agent).await;
        client.change_generation(&Generation::default()).await.unwrap();
        let gone = end_of(&client, &first).await;
        assert_eq!(gone.code, Code::NotFound, "{gone}");
    });
}

#[test]
fn a_watcher_that_nobody_asks_is_bounded() {
    let agent = Agent::start();
    run(async {
        let (client, dir, watcher) = watched(&agent).await;
        for number in 0..20_000 {
            std::fs::create_dir(format!("{dir}/{number}")).unwrap();
        }
        until("the agent has read all events that it takes", async || {
            inotify_of(&agent).is_none_or(|inotify| rustix::io::ioctl_fionread(&inotify).unwrap() == 0)
        })
        .await;
        let error =
            client.call::<_, WatcherEvents>("filesystem.Filesystem/GetWatcherEvents", &watcher).await.unwrap_err();
        // The agent's limit, or the kernel's.
        let ClientError::Rpc(error) = error else { panic!("{error}") };
        assert!(matches!(error.code, Code::ResourceExhausted | Code::Internal), "{error}");
    });
}
