//! The sockets of a VM, served on a runtime.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use clade_api::http::{Acceptor, MAX_CONNECTIONS, accept};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::router as router_of;
use crate::vm_host::{Serve, Serving, Sockets, VmHost, WeakVmHost};
use crate::{console, image};
use clade_vmm::vm::{Context, Leases, Vm};

/// Time limit of clients to read the answers to open requests when the process ends.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Serves the sockets of a VM host on a runtime.
struct Listener {
    runtime: Handle,
    vm_host: WeakVmHost,
    /// Made at the first connection. Most VMs are never asked, and start sooner.
    router: Arc<OnceLock<Router>>,
    connections: Arc<Semaphore>,
    consoles: Arc<Semaphore>,
    ending: watch::Sender<bool>,
}

/// Aborts a task when dropped.
struct Abort(AbortHandle);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Serve for Listener {
    fn begin(&self, sockets: Sockets, vm: &Arc<Vm>, leases: &Leases) -> Serving {
        let mut tasks = Vec::new();
        let images =
            self.runtime.spawn(image::serve(sockets.image, Arc::downgrade(vm), leases.clone(), self.vm_host.clone()));
        tasks.push(Abort(images.abort_handle()));
        for (line, socket) in sockets.consoles {
            let served =
                self.runtime.spawn(console::serve(socket, Arc::downgrade(vm), line, Arc::clone(&self.consoles)));
            tasks.push(Abort(served.abort_handle()));
        }
        let (router, vm_host) = (Arc::clone(&self.router), self.vm_host.clone());
        let (connections, ending) = (Arc::clone(&self.connections), self.ending.clone());
        let made = move || router.get_or_init(|| router_of(vm_host.clone())).clone();
        let control = self.runtime.spawn(async move {
            let Some(acceptor) = Acceptor::new(sockets.control, "control socket") else { return };
            accept(acceptor, made, &connections, ending.subscribe()).await;
        });
        tasks.push(Abort(control.abort_handle()));
        Serving::new(tasks)
    }

    fn finish(&self) {
        // Without a receiver there is no connection to end.
        let _ = self.ending.send(true);
        let all = self.connections.acquire_many(MAX_CONNECTIONS as u32);
        let consoles = self.consoles.acquire_many(console::MAX_CONNECTIONS as u32);
        // Connections still open then are cut off.
        self.runtime.block_on(async {
            let _ = timeout(console::LAST_OUTPUT, consoles).await.map(drop);
            let _ = timeout(LAST_ANSWERS, all).await.map(drop);
        });
    }
}

/// Returns the VM host of this process, and serves its VM's sockets on `runtime`.
pub(crate) fn serve_vm(context: &Context, runtime: &Handle) -> VmHost {
    VmHost::new(context, |vm_host| {
        Box::new(Listener {
            runtime: runtime.clone(),
            vm_host: vm_host.clone(),
            router: Arc::default(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            consoles: Arc::new(Semaphore::new(console::MAX_CONNECTIONS)),
            ending: watch::Sender::new(false),
        })
    })
}
