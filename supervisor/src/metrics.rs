//! `GET /metrics`: the VMs of the directory and the supervisor itself, for Prometheus.
//!
//! Each scrape asks all VMs. Between two scrapes nothing is done.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};

use super::Supervisor;
use super::idempotency::REPLAYED;
use crate::exposition::{CONTENT_TYPE, Exposition, MetricKind, MetricLabels};
use clade_api::http::ApiError;
use clade_api::{Client, Gathered, HistogramInfo, ProblemKind, VmState, VmStats, pages_kib};
use clade_vmm::vm::Histogram;

/// Requests to the supervisor so far.
#[derive(Debug, Default)]
pub(super) struct Requests {
    by_status: Mutex<BTreeMap<u16, u64>>,
    pub(super) forks: Histogram,
    boots: Histogram,
}

impl Requests {
    /// Counts an answer.
    pub(super) fn count(&self, status: StatusCode) {
        *self.by_status().entry(status.as_u16()).or_default() += 1;
    }

    fn by_status(&self) -> MutexGuard<'_, BTreeMap<u16, u64>> {
        self.by_status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts the requests to all paths of a router.
pub(super) fn observed(router: Router<Supervisor>, requests: &Arc<Requests>) -> Router<Supervisor> {
    router.layer(from_fn_with_state(Arc::clone(requests), count))
}

async fn count(State(requests): State<Arc<Requests>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned()).unwrap_or_default();
    let is_post = request.method() == hyper::Method::POST;
    let response = next.run(request).await;
    requests.count(response.status());
    // A repeated answer does not show the time of the request.
    if is_post && response.status().is_success() && !response.headers().contains_key(REPLAYED) {
        match path.as_str() {
            "/v1/vms/{name}/fork" | "/v1/checkpoints/{name}/fork" => requests.forks.record(begun.elapsed()),
            "/v1/vms" => requests.boots.record(begun.elapsed()),
            _ => {}
        }
    }
    response
}

/// Shows all VMs and the supervisor in numbers, for Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    responses((status = 200, description = "The exposition.", body = String, content_type = "text/plain"))
)]
pub(super) async fn scrape(State(supervisor): State<Supervisor>) -> Result<Response, ApiError> {
    let too_many = |_| ApiError::new(ProblemKind::TooMany, "metrics are being gathered for as many clients as may be");
    let _turn = supervisor.0.scrapes.try_acquire().map_err(too_many)?;
    let client = Client::new(supervisor.dir());
    let gathered = client.gather(client.names()?).await;
    let mut out = Exposition::default();
    own(&mut out, &supervisor, &gathered);
    of_vms(&mut out, &gathered.vms);
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], out.finish()).into_response())
}

/// Writes the supervisor's own metrics.
fn own(out: &mut Exposition, supervisor: &Supervisor, gathered: &Gathered) {
    let requests = &supervisor.0.requests;
    let info = supervisor.info();
    out.family("clade_build_info", MetricKind::Gauge, "The supervisor's version.");
    out.count(&[("version", &info.version)], 1);
    out.family("clade_supervised_vms", MetricKind::Gauge, "VMs whose processes the supervisor has started.");
    out.count(&[], info.vms as u64);
    out.family("clade_checkpoints", MetricKind::Gauge, "Checkpoints that are held.");
    out.count(&[], info.checkpoints as u64);
    out.family("clade_prepared_workers", MetricKind::Gauge, "Processes that are prepared for forks.");
    out.count(&[], info.prepared as u64);
    out.family("clade_vms", MetricKind::Gauge, "VMs of the directory that have answered, by state.");
    let states = [
        ("running", VmState::Running),
        ("paused", VmState::Paused),
        ("suspended", VmState::Suspended),
        ("stopped", VmState::Stopped),
    ];
    for (name, state) in states {
        out.count(&[("state", name)], gathered.vms.iter().filter(|vm| vm.state == state).count() as u64);
    }
    out.family("clade_vms_silent", MetricKind::Gauge, "VMs that have not answered in time and are left out.");
    out.count(&[], gathered.silent.len() as u64);
    out.family(
        "clade_requests_total",
        MetricKind::Counter,
        "Requests to the supervisor that were answered, by status.",
    );
    for (status, count) in requests.by_status().iter() {
        out.count(&[("status", &status.to_string())], *count);
    }
    out.family("clade_fork_seconds", MetricKind::Histogram, "Fork requests, until the last child runs.");
    out.histogram(&[], &HistogramInfo::from(requests.forks.counts()));
    out.family("clade_boot_seconds", MetricKind::Histogram, "Boot requests, until the VM runs.");
    out.histogram(&[], &HistogramInfo::from(requests.boots.counts()));
}

/// Returns the VM at the root of each VM's family: the first ancestor whose parent does not run.
fn clades(vms: &[VmStats]) -> BTreeMap<&str, &str> {
    let parents: BTreeMap<&str, Option<&str>> = vms.iter().map(|vm| (vm.name.as_str(), vm.parent.as_deref())).collect();
    let root = |name| {
        let (mut at, mut seen) = (name, BTreeSet::from([name]));
        while let Some(parent) = parents.get(at).copied().flatten() {
            // The name may be a descendant's by now.
            if !seen.insert(parent) {
                break;
            }
            at = parent;
        }
        at
    };
    parents.keys().map(|name| (*name, root(*name))).collect()
}

/// One sample a VM for each of some labels and numbers.
type Of = for<'a> fn(&'a VmStats) -> Vec<(&'static str, u64)>;

/// A metric of VMs: name, kind, help, the label that distinguishes its samples, its samples.
type Metric = (&'static str, MetricKind, &'static str, &'static str, Of);

const KIB: u64 = 1024;

/// The metrics of VMs that are numbers.
const METRICS: &[Metric] = &[
    ("clade_vm_pages", MetricKind::Gauge, "Guest pages by what they are.", "kind", |vm| {
        let pages = &vm.memory.pages;
        vec![
            ("absent", pages.absent),
            ("reference", pages.reference),
            ("shared", pages.shared),
            ("exclusive", pages.exclusive),
            ("pinned", pages.pinned),
        ]
    }),
    ("clade_vm_memory_bytes", MetricKind::Gauge, "Memory of the VM by who has it.", "kind", |vm| {
        let alone = pages_kib(vm.memory.alone_pages);
        vec![("private", vm.memory.private_kib.saturating_mul(KIB)), ("shared_alone", alone.saturating_mul(KIB))]
    }),
    ("clade_vm_layers", MetricKind::Gauge, "Layers that the VM is shown.", "", |vm| {
        vec![("", vm.memory.layers.len() as u64)]
    }),
    ("clade_vm_mappings", MetricKind::Gauge, "Memory mappings that the VM takes.", "", |vm| {
        vec![("", vm.memory.mappings)]
    }),
    (
        "clade_vm_copied_pages_total",
        MetricKind::Counter,
        "Pages copied on write, for pins or by forks.",
        "cause",
        |vm| vm.copies.by_cause().into(),
    ),
    ("clade_vm_pins", MetricKind::Gauge, "Pins of pages for DMA.", "kind", |vm| {
        vec![("counted", vm.pins.now), ("long", vm.pins.long), ("reading", vm.pins.reading)]
    }),
    ("clade_vm_pins_total", MetricKind::Counter, "Pins that took a lock, and long-term pins.", "kind", |vm| {
        vec![("locked", vm.pins.locked), ("long", vm.pins.long_total)]
    }),
    ("clade_vm_process_bytes", MetricKind::Gauge, "What the kernel says of the VM's process.", "kind", |vm| {
        let of = |process: &clade_api::ProcessStats| {
            vec![
                ("page_tables", process.page_tables_kib.saturating_mul(KIB)),
                ("anonymous", process.anonymous_kib.saturating_mul(KIB)),
                ("memory_files", process.memory_files_kib.saturating_mul(KIB)),
                ("proportional", process.proportional_kib.saturating_mul(KIB)),
            ]
        };
        vm.process.as_ref().map_or_else(Vec::new, of)
    }),
];

fn of_vms(out: &mut Exposition, vms: &[VmStats]) {
    let clades = clades(vms);
    let clade = |vm: &VmStats| clades.get(vm.name.as_str()).copied().unwrap_or_default().to_owned();
    for (name, kind, help, label, samples) in METRICS {
        out.family(name, *kind, help);
        for vm in vms {
            let clade = clade(vm);
            for (which, value) in samples(vm) {
                let labels = [("vm", vm.name.as_str()), ("clade", &clade), (*label, which)];
                out.count(if label.is_empty() { &labels[..2] } else { &labels }, value);
            }
        }
    }
    out.family("clade_vm_longest_pin_seconds", MetricKind::Gauge, "The longest that a long-term pin was held so far.");
    for vm in vms {
        out.sample(&[("vm", &vm.name), ("clade", &clade(vm))], vm.pins.longest_s);
    }
    out.family("clade_vm_pause_seconds", MetricKind::Histogram, "Pauses of the VM, by cause.");
    for vm in vms {
        let clade = clade(vm);
        for (cause, pauses) in
            [("fork", &vm.pauses.fork), ("snapshot", &vm.pauses.snapshot), ("reset", &vm.pauses.reset)]
        {
            // Most VMs are children that are never forked: their empty buckets would be most of the
            // text.
            if pauses.count > 0 {
                out.histogram(&[("vm", &vm.name), ("clade", &clade), ("cause", cause)], pauses);
            }
        }
    }
    of_devices(out, vms, &clade);
}

fn of_devices(out: &mut Exposition, vms: &[VmStats], clade: &dyn Fn(&VmStats) -> String) {
    let each = |out: &mut Exposition, add: &dyn Fn(&mut Exposition, &VmStats, MetricLabels<'_>, &str)| {
        for vm in vms {
            add(out, vm, &[("vm", &vm.name), ("clade", &clade(vm))], &clade(vm));
        }
    };
    out.family(
        "clade_vm_network_bytes_total",
        MetricKind::Counter,
        "Bytes of network devices, as the guest sees them.",
    );
    each(out, &|out, vm, _, clade| {
        for net in &vm.nets {
            for (direction, bytes) in [("received", net.received_bytes), ("sent", net.sent_bytes)] {
                let labels = [("vm", vm.name.as_str()), ("clade", clade), ("interface", &net.tap)];
                out.count(&[&labels[..], &[("direction", direction)]].concat(), bytes);
            }
        }
    });
    out.family(
        "clade_vm_network_dropped_total",
        MetricKind::Counter,
        "Packets that an interface or a driver did not accept.",
    );
    each(out, &|out, vm, _, clade| {
        for net in &vm.nets {
            out.count(&[("vm", &vm.name), ("clade", clade), ("interface", &net.tap)], net.dropped);
        }
    });
    let help = "Packets that were dropped because a VM's network is closed.";
    out.family("clade_vm_network_blocked_total", MetricKind::Counter, help);
    each(out, &|out, vm, _, clade| {
        for net in &vm.nets {
            for (direction, count) in [("received", net.blocked_received), ("sent", net.blocked_sent)] {
                let labels = [("vm", vm.name.as_str()), ("clade", clade), ("interface", &net.tap)];
                out.count(&[&labels[..], &[("direction", direction)]].concat(), count);
            }
        }
    });
    let help = "Packets that egress rules have dropped.";
    out.family("clade_vm_network_egress_dropped_total", MetricKind::Counter, help);
    each(out, &|out, vm, _, clade| {
        for net in &vm.nets {
            out.count(&[("vm", &vm.name), ("clade", clade), ("interface", &net.tap)], net.egress_dropped);
        }
    });
    out.family("clade_vm_disk_no_room_total", MetricKind::Counter, "Writes for which the host had no room.");
    each(out, &|out, vm, _, clade| {
        for (at, disk) in vm.disks.iter().enumerate() {
            out.count(&[("vm", &vm.name), ("clade", clade), ("disk", &at.to_string())], disk.no_room);
        }
    });
    out.family("clade_vm_disk_lost", MetricKind::Gauge, "1 if a write of the disk was lost.");
    each(out, &|out, vm, _, clade| {
        for (at, disk) in vm.disks.iter().enumerate() {
            out.count(&[("vm", &vm.name), ("clade", clade), ("disk", &at.to_string())], u64::from(disk.lost));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(name: &str, parent: Option<&str>) -> VmStats {
        let zeros =
            |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), 0.into())).collect::<serde_json::Map<_, _>>();
        let histogram = serde_json::json!({"count": 1, "sum_us": 20, "buckets": [[16, 0], [32, 1]]});
        let mut memory = zeros(&["private_kib", "alone_pages", "unknown_pages", "mappings", "table_kib"]);
        memory.insert("pages".into(), zeros(&["absent", "reference", "shared", "exclusive", "pinned"]).into());
        memory.insert("layers".into(), serde_json::json!([]));
        serde_json::from_value(serde_json::json!({
            "name": name, "pid": 1, "state": "running", "parent": parent, "generation": 0, "age_s": 1.0,
            "memory": memory,
            "copies": zeros(&["guest", "pin", "adopt", "freeze", "freeze_pinned", "freeze_ahead"]),
            "pins": zeros(&["now", "reading", "locked", "long", "long_total", "longest_s"]),
            "pauses": {"fork": histogram, "snapshot": histogram, "reset": histogram},
        }))
        .unwrap()
    }

    #[test]
    fn a_clade_is_named_after_its_first_ancestor() {
        let vms = [vm("web", None), vm("web-1", Some("web")), vm("deep", Some("web-1")), vm("orphan", Some("gone"))];
        let clades = clades(&vms);
        assert_eq!(
            clades.into_iter().collect::<Vec<_>>(),
            [("deep", "web"), ("orphan", "gone"), ("web", "web"), ("web-1", "web")]
        );
        let ring = [vm("a", Some("b")), vm("b", Some("a"))];
        assert_eq!(super::clades(&ring).len(), 2, "it ends");
    }

    #[test]
    fn samples_of_a_family_follow_its_head() {
        let mut out = Exposition::default();
        of_vms(&mut out, &[vm("web", None), vm("web-1", Some("web"))]);
        let text = out.finish();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(head) = line.strip_prefix("# TYPE ") {
                family = head.split(' ').next().unwrap().to_owned();
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&family) && line.contains("clade=\"web\""), "{line}");
            }
        }
        assert!(
            text.contains("clade_vm_pause_seconds_bucket{vm=\"web-1\",clade=\"web\",cause=\"reset\",le=\"+Inf\"} 1")
        );
    }
}
