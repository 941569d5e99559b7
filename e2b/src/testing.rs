//! A supervisor, its VMs and their agents as tasks of a test, and a gateway over them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use clade_test_support::Watchdog;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tower::ServiceExt;

use crate::gateway::{Gateway, Options};
use crate::keys::Scope;
use crate::listen::router;
use crate::quotas::Quotas;

/// Time limit of a test.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// A VM of the supervisor.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vm {
    /// The checkpoint or the VM that it was forked from.
    pub(crate) parent: String,
    pub(crate) is_paused: bool,
    pub(crate) is_suspended: bool,
    /// Seconds until its end; None without one.
    pub(crate) ttl: Option<f64>,
    pub(crate) is_closed: bool,
    /// Its labels, as its request had them.
    pub(crate) labels: Value,
    /// The token of its agent.
    pub(crate) token: Option<String>,
}

/// The supervisor's state.
#[derive(Debug, Default)]
pub(crate) struct SupervisorState {
    pub(crate) vms: BTreeMap<String, Vm>,
    /// Checkpoints, with whether their network is closed.
    pub(crate) checkpoints: BTreeMap<String, bool>,
    /// The requests to the supervisor and to agents.
    pub(crate) log: Vec<String>,
    /// Number of requests until one is held.
    pub(crate) hold_after: Option<usize>,
    /// Requests with one of these texts are held.
    pub(crate) held: Vec<String>,
    /// The answers of requests with this text are lost.
    pub(crate) lost: Option<String>,
    /// Requests with this text are refused.
    pub(crate) refused: Option<String>,
    /// Number held since the last release.
    held_now: usize,
}

/// The supervisor.
#[derive(Debug)]
pub(crate) struct World {
    dir: PathBuf,
    supervisor_state: Mutex<SupervisorState>,
    is_held: Notify,
    changed: Notify,
}

/// A request that is held, until it is released or its client has gone.
struct Held<'a>(&'a World);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut supervisor_state = self.0.supervisor_state();
        supervisor_state.held_now = supervisor_state.held_now.saturating_sub(1);
        drop(supervisor_state);
        self.0.is_held.notify_waiters();
    }
}

type Answered = Result<Value, StatusCode>;

impl World {
    pub(crate) fn supervisor_state(&self) -> MutexGuard<'_, SupervisorState> {
        self.supervisor_state.lock().unwrap()
    }

    /// Logs a request, and waits as long as such requests are held.
    async fn step(&self, what: String) {
        let number = {
            let mut supervisor_state = self.supervisor_state();
            supervisor_state.log.push(what.clone());
            supervisor_state.log.len()
        };
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            {
                let mut supervisor_state = self.supervisor_state();
                let is_late = supervisor_state.hold_after.is_some_and(|after| number > after);
                if !is_late && !supervisor_state.held.iter().any(|held| what.contains(held.as_str())) {
                    return;
                }
                supervisor_state.held_now += 1;
            }
            self.is_held.notify_waiters();
            let _held = Held(self);
            changed.await;
        }
    }

    /// Waits until a request is held.
    pub(crate) async fn until_held(&self) {
        self.until_held_now(|held| held > 0).await;
    }

    async fn until_held_now(&self, is_so: impl Fn(usize) -> bool) {
        loop {
            let held = self.is_held.notified();
            let mut held = std::pin::pin!(held);
            held.as_mut().enable();
            if is_so(self.supervisor_state().held_now) {
                return;
            }
            held.await;
        }
    }

    /// Holds requests with this text.
    pub(crate) fn hold(&self, what: &str) {
        self.supervisor_state().held.push(what.to_owned());
    }

    /// Lets all requests go on.
    pub(crate) fn release(&self) {
        let mut supervisor_state = self.supervisor_state();
        (supervisor_state.hold_after, supervisor_state.held, supervisor_state.held_now) = (None, Vec::new(), 0);
        drop(supervisor_state);
        self.changed.notify_waiters();
    }

    pub(crate) fn socket(&self, vm: &str) -> PathBuf {
        self.dir.join(format!("{vm}.vsock"))
    }

    fn info(&self, name: &str) -> Answered {
        let vm = self.supervisor_state().vms.get(name).cloned().ok_or(StatusCode::NOT_FOUND)?;
        let state = match (vm.is_suspended, vm.is_paused) {
            (true, _) => "suspended",
            (false, true) => "paused",
            (false, false) => "running",
        };
        let network = if vm.is_closed { "closed" } else { "open" };
        let labels = if vm.labels.is_null() { json!({}) } else { vm.labels };
        Ok(json!({
            "labels": labels, "name": name, "pid": 1, "state": state, "paused": vm.is_paused, "parent": vm.parent, "generation": 1, "cpus": 1, "age_s": 0.0,
            "memory": {
                "mib": 64, "reference_pages": 0, "shared_pages": 0, "exclusive_pages": 0, "pinned_pages": 0,
                "private_kib": 0,
            },
            "vsock": { "cid": 3, "socket": self.socket(name) },
            "nets": [{
                "tap": "", "mac": "02:00:00:00:00:01", "received_bytes": 0, "sent_bytes": 0, "dropped": 0,
                "network": network,
            }],
        }))
    }

    fn fork(self: &Arc<Self>, parent: &str, is_closed: bool, request: &Value) -> Answered {
        let count = request["count"].as_u64().unwrap_or(1);
        let pattern = request["name"].as_str().unwrap_or("child-{n}").to_owned();
        let names: Vec<String> = (1..=count).map(|n| pattern.replace("{n}", &n.to_string())).collect();
        let network = if is_closed { "closed" } else { "open" };
        let is_closed = match request["network"].as_str() {
            Some(link) => link == "closed",
            None => is_closed,
        };
        for name in &names {
            let labels = request["labels"].clone();
            let vm = Vm { parent: parent.to_owned(), is_closed, labels, ..Vm::default() };
            self.supervisor_state().vms.insert(name.clone(), vm);
            std::fs::write(self.dir.join(format!("{name}.sock")), "").unwrap();
            let listener = UnixListener::bind(self.socket(name)).unwrap();
            tokio::spawn(Arc::clone(self).answer_for_agent(listener, name.clone()));
        }
        Ok(json!({
            "children": names, "pause_us": 0.0, "freeze_us": 0.0, "total_us": 0.0,
            "remapped_pages": 0, "copied_pages": 0, "network": network,
        }))
    }

    fn checkpoint(&self, name: &str, is_closed: bool) -> Value {
        let network = if is_closed { "closed" } else { "open" };
        let (at, mib) = (self.dir.join(name), 64);
        json!({
            "name": name, "vm": null, "generation": 1, "cpus": 1, "mib": mib, "age_s": 0.0, "descriptors": 1,
            "pause_us": 0.0, "network": network, "snapshot": at,
        })
    }

    fn stop(&self, name: &str) -> Answered {
        let info = self.info(name)?;
        self.supervisor_state().vms.remove(name);
        for file in [self.dir.join(format!("{name}.sock")), self.socket(name)] {
            std::fs::remove_file(file).unwrap();
        }
        Ok(info)
    }

    fn of_checkpoint(self: &Arc<Self>, method: &Method, name: &str, action: &str, body: &Value) -> Answered {
        let is_closed = self.supervisor_state().checkpoints.get(name).copied().ok_or(StatusCode::NOT_FOUND)?;
        match (method.as_str(), action) {
            ("GET", "") => Ok(self.checkpoint(name, is_closed)),
            ("DELETE", "") => {
                self.supervisor_state().checkpoints.remove(name);
                Ok(self.checkpoint(name, is_closed))
            }
            ("POST", "fork") => self.fork(name, is_closed, body),
            ("POST", "keep") => Ok(self.checkpoint(name, is_closed)),
            _ => Err(StatusCode::METHOD_NOT_ALLOWED),
        }
    }

    fn of_vm(self: &Arc<Self>, method: &Method, name: &str, action: &str, body: &Value) -> Answered {
        let is_closed = self.supervisor_state().vms.get(name).ok_or(StatusCode::NOT_FOUND)?.is_closed;
        let change = |change: &dyn Fn(&mut Vm)| {
            self.supervisor_state().vms.get_mut(name).into_iter().for_each(change);
            self.info(name)
        };
        match (method.as_str(), action) {
            ("GET", "") => self.info(name),
            ("GET", "logs") => Ok(json!({ "console": name })),
            ("PUT", "ttl") => {
                change(&|vm| vm.ttl = body["seconds"].as_f64())?;
                Ok(json!({ "seconds_left": body["seconds"] }))
            }
            ("DELETE", "ttl") => {
                change(&|vm| vm.ttl = None)?;
                Ok(json!({ "seconds_left": null }))
            }
            ("POST", "pause") => change(&|vm| vm.is_paused = true),
            ("POST", "resume") => change(&|vm| vm.is_paused = false),
            ("POST", "suspend") => Ok(json!({
                "name": name, "was_suspended": false, "written_pages": 0, "zero_pages": 0, "kept_pages": 0,
                "halt_us": 0.0, "write_us": 0.0, "total_us": 0.0,
            })),
            ("POST", "network") => change(&|vm| {
                vm.is_closed = body["network"].as_str().map_or(vm.is_closed, |link| link == "closed");
            }),
            ("POST", "fork") => self.fork(name, is_closed, body),
            ("POST", "checkpoint") => {
                let wanted = body["name"].as_str().unwrap_or(name);
                let mut supervisor_state = self.supervisor_state();
                if supervisor_state.checkpoints.contains_key(wanted) {
                    return Err(StatusCode::CONFLICT);
                }
                supervisor_state.checkpoints.insert(wanted.to_owned(), is_closed);
                Ok(self.checkpoint(wanted, is_closed))
            }
            ("POST", "stop") => self.stop(name),
            _ => Err(StatusCode::METHOD_NOT_ALLOWED),
        }
    }

    /// Serves a request, even if its client goes.
    async fn serve(world: Arc<Self>, (of, name, action): (&'static str, String, String), request: Request) -> Response {
        let method = request.method().clone();
        let what = format!("{method} {of} {name} {action}");
        world.step(what.clone()).await;
        let is_refused = world.supervisor_state().refused.as_ref().is_some_and(|refused| what.contains(refused));
        let is_lost = world.supervisor_state().lost.as_ref().is_some_and(|lost| what.contains(lost));
        let bytes = axum::body::to_bytes(request.into_body(), 1 << 22).await.unwrap();
        let body = serde_json::from_slice(&bytes).unwrap_or_default();
        let done = tokio::spawn(async move {
            match of {
                _ if is_refused => Err(StatusCode::CONFLICT),
                "vm" => world.of_vm(&method, &name, &action, &body),
                _ => world.of_checkpoint(&method, &name, &action, &body),
            }
        });
        match done.await.unwrap() {
            Ok(_) if is_lost => "lost".into_response(),
            Ok(answer) => axum::Json(answer).into_response(),
            Err(status) => {
                let problem =
                    json!({ "type": "about:blank", "title": "no", "status": status.as_u16(), "detail": "no" });
                (status, axum::Json(problem)).into_response()
            }
        }
    }

    fn supervise(self: &Arc<Self>, listener: UnixListener) {
        type Of = State<Arc<World>>;
        type Names = UrlPath<(String, String)>;
        let vm = |of| {
            let one = move |State(world): Of, UrlPath(name): UrlPath<String>, request: Request| {
                Self::serve(world, (of, name, String::new()), request)
            };
            let action = move |State(world): Of, UrlPath((name, action)): Names, request: Request| {
                Self::serve(world, (of, name, action), request)
            };
            (any(one), any(action))
        };
        let all = async |State(world): Of| {
            world.step("GET checkpoints".to_owned()).await;
            let all = world.supervisor_state().checkpoints.clone();
            axum::Json(all.iter().map(|(name, is_closed)| world.checkpoint(name, *is_closed)).collect::<Vec<_>>())
        };
        let ((one, action), (checkpoint, of_checkpoint)) = (vm("vm"), vm("checkpoint"));
        let router = Router::new()
            .route("/v1/vms/{name}", one)
            .route("/v1/vms/{name}/{action}", action)
            .route("/v1/checkpoints", get(all))
            .route("/v1/checkpoints/{name}", checkpoint)
            .route("/v1/checkpoints/{name}/{action}", of_checkpoint)
            .with_state(Arc::clone(self));
        tokio::spawn(async move { axum::serve(listener, router).await });
    }

    async fn answer_for_agent(self: Arc<Self>, listener: UnixListener, vm: String) {
        while let Ok((stream, _)) = listener.accept().await {
            let (world, vm) = (Arc::clone(&self), vm.clone());
            if !world.supervisor_state().vms.contains_key(&vm) {
                return;
            }
            tokio::spawn(async move { drop(world.answer_one(stream, vm).await) });
        }
    }

    async fn answer_one(self: Arc<Self>, mut stream: UnixStream, vm: String) -> std::io::Result<()> {
        let to = line(&mut stream).await?;
        stream.write_all(b"OK 1024\n").await?;
        let router = if to == "CONNECT 49983" {
            self.agent(&vm)
        } else {
            line(&mut stream).await?;
            stream.write_all(b"OK\n").await?;
            Router::new().fallback(async move || format!("program of {vm}"))
        };
        let service = TowerToHyperService::new(router);
        let http = hyper::server::conn::http1::Builder::new();
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
        Ok(())
    }

    fn agent(self: &Arc<Self>, vm: &str) -> Router {
        let (world, name) = (Arc::clone(self), vm.to_owned());
        let init = post(async move |axum::Json(init): axum::Json<Value>| {
            world.step(format!("init {name}")).await;
            let mut supervisor_state = world.supervisor_state();
            let Some(vm) = supervisor_state.vms.get_mut(&name) else { return StatusCode::GONE };
            vm.token = init["accessToken"].as_str().map(str::to_owned);
            StatusCode::NO_CONTENT
        });
        let (world, name) = (Arc::clone(self), vm.to_owned());
        let other = async move |headers: HeaderMap| {
            world.step(format!("agent {name}")).await;
            assert_eq!(headers.get_all("x-clade-passed-on").iter().count(), 1, "a client's request is marked");
            let token = world.supervisor_state().vms.get(&name).and_then(|vm| vm.token.clone());
            let shown = headers.get("x-access-token").and_then(|shown| shown.to_str().ok());
            match token.is_some() && token.as_deref() == shown {
                true => (StatusCode::OK, name),
                false => (StatusCode::UNAUTHORIZED, String::new()),
            }
        };
        Router::new().route("/init", init).fallback(other)
    }
}

async fn line(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut text = String::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(text),
            byte => text.push(byte.into()),
        }
    }
}

/// A gateway over a [`World`] with the checkpoint `base`.
pub(crate) struct Fake {
    pub(crate) gateway: Gateway,
    pub(crate) world: Arc<World>,
    pub(crate) router: Router,
    dir: TempDir,
}

impl Fake {
    pub(crate) fn new() -> Self {
        Self::with(Quotas::default())
    }

    pub(crate) fn with(quotas: Quotas) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        std::fs::create_dir(&run).unwrap();
        let gateway = Gateway::of_socket(Self::options(dir.path(), quotas)).unwrap();
        let supervisor_state =
            SupervisorState { checkpoints: [("base".to_owned(), false)].into(), ..SupervisorState::default() };
        let world = Arc::new(World {
            dir: run.clone(),
            supervisor_state: Mutex::new(supervisor_state),
            is_held: Notify::new(),
            changed: Notify::new(),
        });
        world.supervise(UnixListener::bind(clade_api::supervisor_path(&run)).unwrap());
        let router = router(&gateway);
        Self { gateway, world, router, dir }
    }

    fn options(dir: &Path, quotas: Quotas) -> Options {
        let domain = Some("box.test".to_owned());
        let snapshots = Some(dir.join("kept/.snapshots"));
        Options { dir: dir.join("run"), keys: dir.join("keys.json"), domain, templates: None, snapshots, quotas }
    }

    /// The gateway of the next supervisor.
    pub(crate) fn next(&self) -> Gateway {
        Gateway::of_socket(Self::options(self.dir.path(), Quotas::default())).unwrap()
    }

    pub(crate) fn key(&self, name: &str) -> String {
        self.key_of(name, None, Scope::All)
    }

    pub(crate) fn key_of(&self, name: &str, owner: Option<&str>, scope: Scope) -> String {
        self.gateway.0.keys.add(name, owner, scope).unwrap()
    }

    pub(crate) async fn request(&self, request: Request) -> (u16, Value) {
        let answer = self.router.clone().oneshot(request).await.unwrap();
        let status = answer.status().as_u16();
        let bytes = axum::body::to_bytes(answer.into_body(), 1 << 24).await.unwrap();
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        (status, serde_json::from_slice(&bytes).unwrap_or_else(|_| text()))
    }

    pub(crate) fn ask(key: &str, method: &str, path: &str, body: &Value) -> Request {
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        Request::builder().method(method).uri(path).header("x-api-key", key).body(body).unwrap()
    }

    pub(crate) async fn call(&self, key: &str, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.request(Self::ask(key, method, path, &body)).await
    }

    /// Makes a sandbox of `base`, and returns its name.
    pub(crate) async fn sandbox(&self, key: &str, more: Value) -> String {
        let mut body = json!({ "templateID": "base", "timeout": 300 });
        let fields = more.as_object().cloned().unwrap_or_default();
        body.as_object_mut().unwrap().extend(fields);
        let (status, made) = self.call(key, "POST", "/sandboxes", body).await;
        assert_eq!(status, 201, "{made}");
        made["sandboxID"].as_str().unwrap().to_owned()
    }

    /// Begins a call whose client goes after `steps` requests to the supervisor. Returns whether it
    /// had as many.
    pub(crate) async fn drop_after(&self, steps: usize, request: Request) -> bool {
        let is_repeated = request.headers().contains_key("idempotency-key");
        // Requests of earlier calls would count.
        self.gateway.changes_ended().await;
        let so_far = self.world.supervisor_state().log.len();
        self.world.supervisor_state().hold_after = Some(so_far + steps);
        let mut begun = tokio::spawn(self.router.clone().oneshot(request));
        let is_held = tokio::select! {
            () = self.world.until_held() => true,
            answer = &mut begun => { drop(answer); false }
        };
        if is_held {
            begun.abort();
            let _ = begun.await;
            let what = self.world.supervisor_state().log.last().cloned().unwrap_or_default();
            if what.ends_with(" fork") && !is_repeated {
                // It is cancelled.
                self.world.until_held_now(|held| held == 0).await;
            }
        }
        self.world.release();
        is_held
    }
}

/// Waits for a result of tasks without a handle.
pub(crate) async fn until(what: &'static str, mut is_so: impl FnMut() -> bool) {
    let _watchdog = Watchdog::new(LIMIT, move || what.to_owned());
    while !is_so() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
