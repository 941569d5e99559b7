//! Children and booted VMs: workers that make them, all of a request or none (I13).

use std::time::Instant;

use super::about::About;
use super::checkpoint::Checkpoint;
use super::hand::Hand;
use super::{Fetch, Supervisor};
use crate::control::{BootRequest, ForkAnswer, ForkRequest};
use crate::fleet::{Cancel, Children, FleetError, NameClaim, Needs, check_name, check_names, check_room, claim_names};
use crate::jail::is_block_device;
use crate::worker::{BootOrder, EnterOrder, ForkOrder, Made, Order, Shape, Worker, Workers};
use clade_vmm::vm::{Endpoints, VmError};

impl Supervisor {
    /// Forks a VM, in whatever process it is, into children of one instant.
    ///
    /// # Errors
    /// When there is no such VM, or a child cannot be made: then there is none (I13). The parent
    /// runs on.
    pub(crate) fn fork_vm(
        &self,
        vm: &str,
        request: &ForkRequest,
        fetch: Fetch,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, FleetError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        // Before the parent is paused: a refused request costs it nothing.
        let claims = self.claim(vm, request, cancel)?;
        let _making = self.0.making(&claims);
        let claimed = Instant::now();
        let checkpoint = Checkpoint::take(&self.0.dir, vm, &|| self.check(0, request.count, cancel))?;
        drop(fetch);
        tracing::debug!(vm, claim = ?claimed - begun, checkpoint = ?claimed.elapsed(), "fork");
        let made = self.start_children(&checkpoint, claims, request, cancel)?;
        let answer = checkpoint.answer(made, begun.elapsed());
        self.0.events.forked(vm, &answer.children, answer.pause_us);
        Ok(answer)
    }

    /// Starts children from a checkpoint.
    ///
    /// # Errors
    /// As for a VM's.
    pub(crate) fn fork_checkpoint(
        &self,
        name: &str,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<ForkAnswer, FleetError> {
        let begun = Instant::now();
        let _busy = self.0.busy.read();
        let checkpoint = self.0.checkpoints.get(name)?;
        let claims = self.claim(name, request, cancel)?;
        let _making = self.0.making(&claims);
        let made = self.start_children(&checkpoint, claims, request, cancel)?;
        let answer = checkpoint.answer(made, begun.elapsed());
        self.0.events.forked(name, &answer.children, answer.pause_us);
        Ok(answer)
    }

    pub(super) fn claim(
        &self,
        stem: &str,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<NameClaim>, FleetError> {
        check_names(request.count, request.name.as_deref())?;
        // Each name and each process is a descriptor here. What else they need is known when the image is.
        let (count, needs) = (request.count, Needs { descriptors: 4, threads: 1, mappings: 0 });
        check_room(count, needs).map_err(|source| FleetError::Room { count, source })?;
        let identity = request.identity();
        let wanted = Children { count: request.count, pattern: request.name.as_deref(), identity: &identity };
        let listed = self.0.processes.names();
        let check = || self.check(0, request.count, cancel);
        claim_names(&self.0.dir, stem, &wanted, |name| listed.contains(name), check)
    }

    pub(super) fn start_children(
        &self,
        checkpoint: &Checkpoint,
        claims: Vec<NameClaim>,
        request: &ForkRequest,
        cancel: &Cancel,
    ) -> Result<Vec<Made>, FleetError> {
        let count = claims.len();
        let About { shape, identity, session, .. } = checkpoint.about();
        check_room(count, Needs::of_worker(&shape.config)).map_err(|source| FleetError::Room { count, source })?;
        let choice = request.identity();
        let labels = request.labels.as_ref().unwrap_or_else(|| checkpoint.labels());
        // While any is made: a worker is told of directories that are there.
        let _overlays = self.0.overlays.hold(&shape.written())?;
        claims.iter().for_each(|claim| self.0.forget_earlier(&claim.name));
        let order = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::child(&shape.config, identity, &claim.name, &choice).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&shape.written())?;
            let family = (shape, session.as_deref());
            let (mut hand, handed) = Hand::make(claim, worker.pid(), family, overlays, ends, &self.0.broker)?;
            let order = ForkOrder {
                name: claim.name.clone(),
                shape: shape.clone(),
                handed,
                parent: checkpoint.vm().map(str::to_owned),
                is_tied: session.is_some(),
                paused: request.paused,
                labels: labels.clone(),
            };
            worker.fork(order, &hand.files(claim), checkpoint.parts())?;
            hand.sent();
            Ok(hand)
        };
        let enter = self.0.place.of_child(shape);
        let made = self.make(Some(shape), &enter, &claims, order, |made| self.check(made, count, cancel))?;
        claims.into_iter().for_each(NameClaim::leave);
        Ok(made)
    }

    /// Boots a VM.
    ///
    /// # Errors
    /// When the name is taken, or the VM cannot be made.
    pub(crate) fn boot(&self, request: BootRequest, cancel: &Cancel) -> Result<Made, FleetError> {
        let _busy = self.0.busy.read();
        let BootRequest { name, mut config, kernel, initrd, cmdline, labels, paused, session } = request;
        session.as_deref().map_or(Ok(()), check_name)?;
        let claim = NameClaim::new(&self.0.dir, &name)?;
        check_room(1, Needs::of_worker(&config)).map_err(|source| FleetError::Room { count: 1, source })?;
        config.check_devices().map_err(VmError::from)?;
        config.check_queues().map_err(VmError::from)?;
        let shape = Shape::of_boot(&config);
        // The writes of a disk that keeps no journal. Others are made beside the image.
        let mut written = Vec::new();
        for (disk, overlays) in config.disks.iter_mut().zip(&shape.overlays) {
            let has_journal = !disk.disk.ephemeral && !is_block_device(&disk.disk.path);
            if !disk.disk.read_only && !has_journal {
                disk.disk.overlays = Some(overlays.clone());
                written.push(overlays.clone());
            }
        }
        let shape = Shape { config: config.clone(), ..shape };
        let _overlays = self.0.overlays.hold(&written)?;
        let enter = self.0.place.of_boot(&config, &kernel, initrd.as_deref());
        let claims = [claim];
        let _making = self.0.making(&claims);
        self.0.forget_earlier(&claims[0].name);
        let give = |worker: &Worker, claim: &NameClaim| {
            let ends = Endpoints::boot(&config).map_err(VmError::from)?;
            let overlays = self.0.overlays.hold(&written)?;
            let family = (&shape, session.as_deref());
            let (mut hand, handed) = Hand::make(claim, worker.pid(), family, overlays, ends, &self.0.broker)?;
            let (kernel, initrd, cmdline) = (kernel.clone(), initrd.clone(), cmdline.clone());
            let (name, config, labels) = (claim.name.clone(), config.clone(), labels.clone());
            let order =
                BootOrder { name, handed, config, kernel, initrd, cmdline, labels, paused, is_tied: session.is_some() };
            worker.order(&Order::Boot(Box::new(order)), &hand.files(claim))?;
            hand.sent();
            Ok(hand.booted())
        };
        let made = self.make(None, &enter, &claims, give, |made| self.check(made, 1, cancel))?;
        claims.into_iter().for_each(NameClaim::leave);
        made.iter().for_each(|vm| self.0.events.booted(&vm.name));
        made.into_iter().next().ok_or(FleetError::Ending)
    }

    /// Has a worker for each claim make its VM, as `order` says, and then all run. The claims must
    /// outlive this when it fails: names are free when nothing uses them any more.
    fn make(
        &self,
        shape: Option<&Shape>,
        enter: &EnterOrder,
        claims: &[NameClaim],
        order: impl Fn(&Worker, &NameClaim) -> Result<Hand, FleetError>,
        check: impl Fn(usize) -> Result<(), FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        let prepared = shape.map_or_else(Vec::new, |shape| self.0.pool.take(shape, claims.len()));
        let were_prepared = !prepared.is_empty();
        match self.make_with(prepared, enter, claims, &order, &check) {
            // One that was prepared may have died meanwhile. Others have no such excuse.
            Err(FleetError::Worker { source }) if were_prepared => {
                tracing::info!(error = %source, "a prepared worker has failed, and others are taken");
                self.make_with(Vec::new(), enter, claims, &order, &check)
            }
            made => made,
        }
    }

    fn make_with(
        &self,
        prepared: Vec<Worker>,
        enter: &EnterOrder,
        claims: &[NameClaim],
        order: impl Fn(&Worker, &NameClaim) -> Result<Hand, FleetError>,
        check: impl Fn(usize) -> Result<(), FleetError>,
    ) -> Result<Vec<Made>, FleetError> {
        let begun = Instant::now();
        let fresh = |count| {
            let workers = self.0.zygote.workers(count)?;
            workers.iter().try_for_each(|worker| worker.enter(enter.clone()))?;
            Ok::<_, FleetError>(workers)
        };
        let mut workers = Workers(fresh(claims.len() - prepared.len())?);
        // The prepared ones first: they are the first to be done.
        workers.0.splice(..0, prepared);
        let have_workers = Instant::now();
        let mut hands = Vec::with_capacity(claims.len());
        for (at, claim) in claims.iter().enumerate() {
            check(0)?;
            let hand = match order(&workers.0[at], claim) {
                // One that was prepared may have died meanwhile. Another has no such excuse.
                Err(FleetError::Worker { .. } | FleetError::Transfer(_)) => {
                    workers.0[at] = fresh(1)?.pop().ok_or(FleetError::Ending)?;
                    order(&workers.0[at], claim)
                }
                other => other,
            };
            hands.push(hand?);
        }
        // Before they run: one may end at once.
        let pids: Vec<u32> = workers.0.iter().map(Worker::pid).collect();
        for ((worker, claim), hand) in workers.0.iter().zip(claims).zip(&hands) {
            let process = worker.pidfd()?.ok_or(FleetError::Ending)?;
            self.0.processes.add([(worker.pid(), hand.own_vm(&claim.name, process))]);
        }
        let ordered = Instant::now();
        let made = workers.run_together(check).inspect_err(|_| {
            pids.iter().for_each(|pid| drop(self.0.processes.remove(*pid)));
        })?;
        hands.into_iter().for_each(Hand::keep);
        let (workers, orders) = (have_workers - begun, ordered - have_workers);
        tracing::debug!(count = claims.len(), ?workers, ?orders, run = ?ordered.elapsed(), "made");
        Ok(made)
    }
}
