//! VMs that are booted.

use std::path::PathBuf;

use super::steps::{Launch, Note, WorkerEnv};
use crate::Supervisor;
use crate::cgroups::Bounds;
use crate::launched_vm::LaunchedVm;
use crate::session::{Live, Session};
use crate::vm_record::template_of_boot;
use crate::worker_resources::{Start, WorkerResources};
use clade_api::http::{Cancel, ClientProcess};
use clade_api::secrets::{Secrets, SecretsRecord};
use clade_api::{BootRequest, DaemonError, NameClaim, secrets};
use clade_devices::virtio::net::Link;
use clade_vmm::vm::{Endpoints, VmConfig, VmError};
use clade_worker::host_limits::{ResourceDemand, check_host_limits};
use clade_worker::jail::is_block_device;
use clade_worker::{Pace, StartBootRequest, VmTemplate, Worker, WorkerRequest, Workers};

/// A VM to be booted.
struct Boot<'a> {
    supervisor: &'a Supervisor,
    cancel: &'a Cancel,
    /// The request, without its limits, session and secrets.
    request: BootRequest,
    template: VmTemplate,
    /// Directories that the VM's disks write to.
    written: Vec<PathBuf>,
    bounds: Bounds,
    session: Option<Live<'a>>,
    secrets: Secrets,
    record: SecretsRecord,
}

/// Gives each disk without a journal a directory for its writes. Journals are made beside the image.
/// Returns these directories.
fn give_overlays(config: &mut VmConfig, template: &VmTemplate) -> Vec<PathBuf> {
    let mut written = Vec::new();
    for (disk, overlays) in config.disks.iter_mut().zip(&template.overlays) {
        let has_journal = !disk.disk.ephemeral && !is_block_device(&disk.disk.path);
        if !disk.disk.read_only && !has_journal {
            disk.disk.overlays = Some(overlays.clone());
            written.push(overlays.clone());
        }
    }
    written
}

impl Launch for Boot<'_> {
    /// Prepared workers are children of a VM.
    fn template(&self) -> Option<&VmTemplate> {
        None
    }

    fn env(&self) -> WorkerEnv {
        let BootRequest { kernel, initrd, .. } = &self.request;
        let confine = self.supervisor.0.sandbox.of_boot(&self.template.config, kernel, initrd.as_deref());
        WorkerEnv { confine, bounds: self.bounds }
    }

    fn pace(&self) -> Pace {
        if self.request.paused { Pace::Paused } else { Pace::Running }
    }

    fn check(&self, made: usize) -> Result<(), DaemonError> {
        self.supervisor.check(made, 1, self.cancel)
    }

    fn assign(&self, worker: &Worker, claim: &NameClaim) -> Result<WorkerResources, DaemonError> {
        let config = &self.template.config;
        let interfaces: Vec<&str> = config.nets.iter().map(|net| net.tap.as_str()).collect();
        self.supervisor.await_interfaces(&interfaces, || self.check(0))?;
        let ends = Endpoints::boot(config).map_err(VmError::from)?;
        let overlays = self.supervisor.0.overlays.hold(&self.written)?;
        let start = Start {
            template: &self.template,
            session: self.session.as_ref(),
            parent: None,
            ancestors: &[],
            bounds: self.bounds,
            secrets: Some(&self.record),
            pid: worker.pid(),
            network: Some(Link::Open),
        };
        let broker = &self.supervisor.0.broker;
        let (mut resources, passed_fds) = WorkerResources::make(claim, start, overlays, ends, broker)?;
        let BootRequest {
            name: _,
            config: _,
            kernel,
            initrd,
            cmdline,
            labels,
            paused,
            reports_ready,
            session: _,
            limits: _,
            secrets: _,
        } = &self.request;
        let launch = StartBootRequest {
            name: claim.name.clone(),
            passed_fds,
            config: config.clone(),
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            cmdline: cmdline.clone(),
            labels: labels.clone(),
            secrets: self.secrets.clone(),
            paused: *paused,
            reports_ready: *reports_ready,
        };
        worker.request(&WorkerRequest::Boot(Box::new(launch)), &resources.files(claim))?;
        resources.sent();
        Ok(resources.booted())
    }

    fn is_awaited(&self) -> bool {
        false
    }

    /// A booted VM has no image.
    fn await_image(&self) -> Result<(), DaemonError> {
        Ok(())
    }

    /// A booted VM has no image.
    fn give_image(&self, workers: &Workers) -> Result<Vec<Note>, DaemonError> {
        Ok(workers.0.iter().map(|_| None).collect())
    }
}

impl Supervisor {
    /// Boots a VM.
    ///
    /// # Errors
    /// When the name is taken, or the VM cannot be made.
    pub(crate) fn boot(
        &self,
        mut request: BootRequest,
        client: Option<ClientProcess>,
        cancel: &Cancel,
    ) -> Result<LaunchedVm, DaemonError> {
        let _busy = self.0.busy.read();
        let bounds = self.bounds(std::mem::take(&mut request.limits))?;
        secrets::check(&request.secrets)?;
        let secrets = Secrets::of(std::mem::take(&mut request.secrets));
        let record = SecretsRecord::of(&secrets).map_err(|source| DaemonError::Worker { source })?;
        let session = request.session.take().map(|name| Session::of(&name, client)).transpose()?;
        let session = session.as_ref().map(|session| session.expect_live(1)).transpose()?;
        let claims = [NameClaim::new(&self.0.dir, &request.name)?];
        let _launching = self.0.launching.begin(&claims);
        // Before the wait for writers: its process may be one.
        self.0.forget_earlier(&request.name);
        let config = &mut request.config;
        check_host_limits(1, ResourceDemand::of(config))
            .map_err(|source| DaemonError::HostLimit { count: 1, source })?;
        config.check_devices().map_err(VmError::from)?;
        config.check_queues().map_err(VmError::from)?;
        self.wait_for_writers(config, cancel)?;
        let template = template_of_boot(config);
        let written = give_overlays(config, &template);
        let template = VmTemplate { config: config.clone(), ..template };
        let _overlays = self.0.overlays.hold(&written)?;
        let boot = Boot { supervisor: self, cancel, request, template, written, bounds, session, secrets, record };
        let made = self.make(&boot, &claims)?;
        claims.into_iter().for_each(NameClaim::leave);
        made.iter().for_each(|vm| self.0.events.booted(&vm.name));
        made.into_iter().next().ok_or(DaemonError::Ending)
    }
}
