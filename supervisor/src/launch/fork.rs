//! Children of an image: the requests to their workers, and the parts of their parent.

use std::cell::{OnceCell, Ref, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use super::ChildSource;
use super::steps::{Launch, Note, WorkerEnv};
use crate::Supervisor;
use crate::checkpoint::Checkpoint;
use crate::processes::ProcessId;
use crate::session::Live;
use crate::worker_resources::{Start, WorkerResources};
use clade_api::http::Cancel;
use clade_api::secrets::SecretsRecord;
use clade_api::{DaemonError, ForkRequest, NameClaim, ProblemKind};
use clade_devices::virtio::net::Link;
use clade_vmm::vm::{ChildIdentity, Endpoints, VmError};
use clade_worker::ahead::{AheadRequest, Learning, note};
use clade_worker::{Inherited, Pace, StartChildRequest, VmTemplate, Worker, WorkerRequest, Workers};

fn failed(source: std::io::Error) -> DaemonError {
    DaemonError::Worker { source }
}

/// Returns the error of an image, as one that is no failure of a child's worker: other workers would not do better.
fn of_image(error: DaemonError) -> DaemonError {
    match error {
        DaemonError::Worker { .. } => {
            DaemonError::Refused { kind: error.problem(), text: clade_vmm::error_chain(&error) }
        }
        other => other,
    }
}

/// Children to be started.
pub(super) struct Children<'a, 'o> {
    supervisor: &'a Supervisor,
    origin: &'a ChildSource<'o>,
    request: &'a ForkRequest,
    cancel: &'a Cancel,
    count: usize,
    /// Pages that each may copy ahead.
    budget: u64,
    secrets: Option<SecretsRecord>,
    ancestors: Vec<ProcessId>,
    /// Their session, which must live until all are made.
    session: Option<Live<'a>>,
    choice: ChildIdentity,
    network: Option<Link>,
    /// Whether the request names the state of the network.
    is_chosen: bool,
    /// The names and processes of those whose workers have a request.
    processes: RefCell<Vec<(String, ProcessId)>>,
    /// The pages that they are likely to write, if that is learned.
    likely: OnceCell<OwnedFd>,
}

impl<'a, 'o> Children<'a, 'o> {
    /// # Errors
    /// When the request is not possible, or their session has ended.
    pub(super) fn new(
        supervisor: &'a Supervisor,
        origin: &'a ChildSource<'o>,
        request: &'a ForkRequest,
        count: usize,
        cancel: &'a Cancel,
    ) -> Result<Self, DaemonError> {
        let budget = Learning::budget(supervisor.ahead_pages(origin, request)?, count);
        let parent = origin.vm_record;
        let secrets = match &parent.secrets {
            None => request.without_secrets.then_some(SecretsRecord::Withheld),
            Some(secrets) => Some(secrets.of_child(request.without_secrets)),
        };
        let session = match (&parent.session, origin.learning) {
            (Some(session), None) => Some(session.expect_live(count)?),
            // A checkpoint outlives the session of its VM.
            (Some(session), Some(_)) => session.live(),
            (None, _) => None,
        };
        let mut choice = request.identity();
        let (network, is_chosen) = (choice.network.or(origin.network), choice.network.is_some());
        // The image comes from the parent's process, which may lie about the network.
        choice.network = choice.network.or(origin.network.filter(|network| *network == Link::Closed));
        Ok(Self {
            supervisor,
            origin,
            request,
            cancel,
            count,
            budget,
            secrets,
            ancestors: parent.ancestors_of_child(),
            session,
            choice,
            network,
            is_chosen,
            processes: RefCell::new(Vec::with_capacity(count)),
            likely: OnceCell::new(),
        })
    }

    fn learns(&self) -> Option<&Arc<Learning>> {
        self.origin.learning.filter(|_| self.budget > 0)
    }

    /// Returns the names and processes of the children.
    pub(super) fn processes(&self) -> Ref<'_, Vec<(String, ProcessId)>> {
        self.processes.borrow()
    }

    /// Checks that the session of the children lives, after `made` of them.
    fn check_session(&self, made: usize) -> Result<(), DaemonError> {
        self.session.as_ref().map_or(Ok(()), |live| live.check(made, self.count))
    }

    /// Returns the reason for `error`: the workers end with the command of their session.
    pub(super) fn reason(&self, error: DaemonError) -> DaemonError {
        self.check_session(0).err().unwrap_or(error)
    }

    /// Refuses an image whose network was closed after the parent's record was read: the children's
    /// interfaces are open.
    fn expect_network(&self, image: &Checkpoint) -> Result<(), DaemonError> {
        if self.network == Some(Link::Open) && !self.is_chosen && image.network() == Some(Link::Closed) {
            let text = "the network of the VM was closed while the VM was forked".to_owned();
            return Err(DaemonError::Refused { kind: ProblemKind::WrongState, text });
        }
        Ok(())
    }
}

impl Launch for Children<'_, '_> {
    fn template(&self) -> Option<&VmTemplate> {
        Some(&self.origin.vm_record.template)
    }

    fn env(&self) -> WorkerEnv {
        let parent = self.origin.vm_record;
        WorkerEnv { confine: self.supervisor.0.sandbox.of_child(&parent.template), bounds: parent.bounds }
    }

    fn pace(&self) -> Pace {
        if self.request.paused { Pace::Paused } else { Pace::Running }
    }

    fn check(&self, made: usize) -> Result<(), DaemonError> {
        self.check_session(made).and_then(|()| self.supervisor.check(made, self.count, self.cancel))
    }

    fn assign(&self, worker: &Worker, claim: &NameClaim) -> Result<WorkerResources, DaemonError> {
        let (supervisor, parent) = (self.supervisor, self.origin.vm_record);
        let template = &parent.template;
        let interfaces: Vec<&str> = self.choice.nets.iter().filter_map(|net| net.tap.as_deref()).collect();
        supervisor.await_interfaces(&interfaces, || self.check(0))?;
        let ends =
            Endpoints::child(&template.config, &parent.identity, &claim.name, &self.choice).map_err(VmError::from)?;
        let overlays = supervisor.0.overlays.hold(&template.written())?;
        let start = Start {
            template,
            session: self.session.as_ref(),
            parent: self.origin.vm,
            ancestors: &self.ancestors,
            bounds: parent.bounds,
            secrets: self.secrets.as_ref(),
            pid: worker.pid(),
            network: self.network,
        };
        let (mut resources, passed_fds) = WorkerResources::make(claim, start, overlays, ends, &supervisor.0.broker)?;
        let launch = StartChildRequest {
            name: claim.name.clone(),
            template: template.clone(),
            passed_fds,
            parent: self.origin.vm.map(str::to_owned),
            paused: self.request.paused,
        };
        worker.request(&WorkerRequest::Fork(Box::new(launch)), &resources.files(claim))?;
        resources.sent();
        let process = resources.process().map(|process| (claim.name.clone(), process));
        self.processes.borrow_mut().extend(process);
        Ok(resources)
    }

    fn is_awaited(&self) -> bool {
        !self.request.paused && !self.request.without_secrets
    }

    fn await_image(&self) -> Result<(), DaemonError> {
        (self.origin.image)().map_err(of_image)?;
        // Here: it may take a while, as other children have written.
        if let Some(learning) = self.learns() {
            let _ = self.likely.set(learning.likely(self.budget).map_err(failed)?);
        }
        Ok(())
    }

    fn give_image(&self, workers: &Workers) -> Result<Vec<Note>, DaemonError> {
        let image = (self.origin.image)().map_err(of_image)?;
        self.expect_network(image)?;
        let labels = self.request.labels.as_ref().unwrap_or_else(|| image.labels()).clone();
        let (secrets, withhold) = (image.secrets().clone(), self.request.without_secrets);
        if withhold {
            secrets.expect_known(self.origin.vm)?;
        }
        let learns = self.learns();
        let ahead = learns.map(|_| AheadRequest { pages: self.budget });
        let inherited = Inherited { labels, secrets, withhold, ahead };
        let of_child = |learning: &Arc<Learning>| -> std::io::Result<_> { Ok((note()?, Arc::downgrade(learning))) };
        let give = |worker: &Worker| {
            let note: Option<(_, Weak<Learning>)> = learns.map(of_child).transpose().map_err(failed)?;
            let files: Vec<_> =
                self.likely.get().into_iter().chain(note.iter().map(|(note, _)| note)).map(AsFd::as_fd).collect();
            worker.give_image(&inherited, &files, image.parts())?;
            Ok(note)
        };
        workers.0.iter().map(give).collect()
    }
}
