//! Watches: as a stream, and as watchers that are polled.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use clade_agent_proto::filesystem::{
    EventType, FilesystemEvent, KeepAlive, WatchDirResponse, WatchRequest, Watcher, WatcherEvents,
};
use clade_agent_proto::process::Empty;
use clade_agent_proto::{Code, RpcError};

use super::filesystem::{elsewhere, place};
use crate::agent::Agent;
use crate::connect::{Caller, Sink};
use crate::filesystem::entry::{entry, failed};
use crate::filesystem::inotify::{Event, Inotify};
use crate::filesystem::watchers::{MAX_EVENTS, MAX_WATCHERS, Watched};
use crate::lock::lock;
use crate::users::Names;

/// File systems of other machines and of programs: NFS, CIFS, SMB, SMB2, FUSE.
const REMOTE: [i64; 5] = [0x6969, 0xFF53_4D42, 0x517B, 0xFE53_4D42, 0x6573_5546];

/// A started watch.
struct Watch {
    inotify: Inotify,
    root: PathBuf,
    with_entry: bool,
}

impl Watch {
    async fn begin(agent: &Agent, request: &WatchRequest, caller: &Caller) -> Result<Self, RpcError> {
        let (_, root) = place(agent, caller, &request.path)?;
        let may_be_remote = request.allow_network_mounts;
        let looked_at = root.clone();
        elsewhere(move || look(&looked_at, may_be_remote)).await??;
        let failed = |error: std::io::Error| {
            let code = match error.kind() {
                std::io::ErrorKind::Unsupported => Code::Unimplemented,
                _ if error.raw_os_error() == Some(rustix::io::Errno::NOSYS.raw_os_error()) => Code::Unimplemented,
                _ => Code::ResourceExhausted,
            };
            RpcError::new(code, format_args!("{} cannot be watched: {error}", root.display()))
        };
        let inotify = Inotify::new(&root, request.recursive).map_err(failed)?;
        let inotify = elsewhere(move || inotify.begin()).await?.map_err(failed)?;
        Ok(Self { inotify, root, with_entry: request.include_entry })
    }

    async fn next(&mut self) -> Result<Vec<FilesystemEvent>, RpcError> {
        let events = self.inotify.next().await;
        let events = events.map_err(|error| RpcError::internal(format_args!("the watch has failed: {error}")))?;
        let names = self.with_entry.then(Names::read);
        Ok(events.into_iter().map(|event| self.message(event, names.as_ref())).collect())
    }

    fn message(&self, (kind, path): Event, names: Option<&Names>) -> FilesystemEvent {
        // After a removal or a move, the path may refer to another entry.
        let is_there = matches!(kind, EventType::Create | EventType::Write | EventType::Chmod);
        let found = names.filter(|_| is_there).and_then(|names| entry(&self.root.join(&path), names).ok());
        let name = if path.as_os_str().is_empty() { ".".into() } else { path.to_string_lossy().into_owned() };
        FilesystemEvent { name, kind, entry: found }
    }
}

fn look(path: &Path, may_be_remote: bool) -> Result<(), RpcError> {
    let found = std::fs::metadata(path).map_err(|error| failed(path, &error))?;
    if !found.is_dir() {
        return Err(RpcError::invalid(format_args!("path {} not a directory", path.display())));
    }
    let of = rustix::fs::statfs(path).map_err(|error| failed(path, &error.into()))?;
    if !may_be_remote && REMOTE.contains(&of.f_type) {
        return Err(RpcError::invalid(format_args!("cannot watch path on network filesystem: {}", path.display())));
    }
    Ok(())
}

impl Agent {
    /// `WatchDir`: events as they happen.
    pub(crate) async fn watch_dir(
        self: Arc<Self>,
        request: WatchRequest,
        caller: Caller,
        mut sink: Sink,
    ) -> Result<(), RpcError> {
        let mut watch = Watch::begin(&self, &request, &caller).await?;
        sink.send(&WatchDirResponse { start: Some(KeepAlive {}), ..WatchDirResponse::default() }).await?;
        loop {
            let events = tokio::select! {
                events = watch.next() => events?,
                () = tokio::time::sleep(caller.keepalive) => Vec::new(),
                () = sink.closed() => return Ok(()),
            };
            if events.is_empty() {
                sink.send(&WatchDirResponse { keepalive: Some(KeepAlive {}), ..WatchDirResponse::default() }).await?;
            }
            for event in events {
                sink.send(&WatchDirResponse { filesystem: Some(event), ..WatchDirResponse::default() }).await?;
            }
        }
    }

    pub(crate) async fn create_watcher(&self, request: WatchRequest, caller: Caller) -> Result<Watcher, RpcError> {
        let full = || RpcError::new(Code::ResourceExhausted, format_args!("there are {MAX_WATCHERS} watchers"));
        if !self.watchers.has_room() {
            return Err(full());
        }
        let mut watch = Watch::begin(self, &request, &caller).await?;
        let watched = Arc::new(Watched { events: Mutex::new(Ok(Vec::new())) });
        let kept = Arc::clone(&watched);
        let task = tokio::spawn(async move {
            loop {
                let next = watch.next().await;
                let mut events = lock(&kept.events);
                let Ok(known) = &mut *events else { return };
                match next {
                    Ok(next) if known.len() + next.len() <= MAX_EVENTS => known.extend(next),
                    Ok(_) => {
                        let why = format_args!("more than {MAX_EVENTS} events: the watcher was not asked in time");
                        *events = Err(RpcError::new(Code::ResourceExhausted, why));
                        return;
                    }
                    Err(error) => {
                        *events = Err(error);
                        return;
                    }
                }
            }
        });
        // Relaxed: only this thread counts.
        let number = self.watchers.made.fetch_add(1, Ordering::Relaxed);
        let watcher_id = format!("w{number}");
        lock(&self.watchers.open).insert(watcher_id.clone(), (watched, task));
        Ok(Watcher { watcher_id })
    }

    pub(crate) fn watcher_events(&self, request: &Watcher) -> Result<WatcherEvents, RpcError> {
        let open = lock(&self.watchers.open);
        let (watched, _) = open.get(&request.watcher_id).ok_or_else(|| no_watcher(request))?;
        let mut events = lock(&watched.events);
        match &mut *events {
            Ok(events) => Ok(WatcherEvents { events: std::mem::take(events) }),
            Err(error) => Err(error.clone()),
        }
    }

    pub(crate) fn remove_watcher(&self, request: &Watcher) -> Result<Empty, RpcError> {
        let (_, task) = lock(&self.watchers.open).remove(&request.watcher_id).ok_or_else(|| no_watcher(request))?;
        task.abort();
        Ok(Empty {})
    }
}

fn no_watcher(request: &Watcher) -> RpcError {
    RpcError::not_found(format_args!("watcher with id {} not found", request.watcher_id))
}
