//! Two tenants that know everything of each other but their keys and tokens. A generator makes calls
//! of each: its own, and hostile ones that name the other's sandboxes, snapshots, pages and keys for
//! repetition. Neither tenant learns of the other, changes it, or leaves something behind. The test
//! compares answers with models of its own calls, and not with the host's records.

mod caller;
mod foreign;
mod http;
mod latency;
mod model;
mod oracle;
mod spelling;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clade_test_support::{Cid, Random, TapName};
use serde_json::{Value, json};

use self::caller::{Caller, Tenant};
use self::foreign::Stranger;
use self::model::Actor;
use crate::cached;
use crate::e2b::Host;
use crate::tool::{kvm, stem, wait_until};

/// Clients of a tenant that make foreign calls alone, beside the one that has its sandboxes.
const STRANGERS: u64 = 2;
/// Threads for blocking work go after ten idle seconds.
const IDLE: Duration = Duration::from_secs(12);

/// Resources that the supervisor and the host hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    mounts: usize,
    processes: usize,
    files: BTreeSet<String>,
    interfaces: BTreeSet<String>,
}

/// The clients of one tenant, which keep their state from phase to phase.
struct Side {
    actor: Actor,
    strangers: Vec<Stranger>,
}

impl Side {
    fn new(me: &Arc<Tenant>, other: &Arc<Tenant>, seed: u64) -> Self {
        let caller =
            |number: u64| Caller::new(me, other, seed.wrapping_mul(0x9e37_79b9).wrapping_add(number * 0x5851_f42d));
        Self {
            actor: Actor::new(caller(0)),
            strangers: (1..=STRANGERS).map(|number| Stranger::new(caller(number))).collect(),
        }
    }

    fn tenant(&self) -> &Arc<Tenant> {
        &self.actor.caller.me
    }

    /// Makes calls until the tenant has made `most`, and `is_over`.
    fn run(&mut self, most: u64, is_over: impl Fn() -> bool + Sync) {
        let tenant = Arc::clone(self.tenant());
        let goes_on = || tenant.count() < most || !is_over();
        thread::scope(|scope| {
            for stranger in &mut self.strangers {
                scope.spawn(|| {
                    while goes_on() {
                        stranger.turn();
                    }
                    stranger.rest();
                });
            }
            while goes_on() {
                self.actor.turn();
            }
        });
        self.actor.compare();
        self.actor.caller.client.rest();
    }

    /// Makes the sandboxes and snapshots that stay to the end.
    fn settle(&mut self) {
        let private = json!({ "network": {"allowPublicTraffic": false}, "autoResume": {"enabled": true} });
        for more in [json!({}), private.clone(), private] {
            self.actor.make(&more, None, true).unwrap_or_else(|| panic!("a sandbox with {more}"));
        }
        let name = format!("kept-{}", self.actor.caller.digits(18));
        for name in [Some(name.as_str()), None] {
            self.actor.take(name).unwrap_or_else(|| panic!("a snapshot {name:?}"));
        }
        if let Some(last) = self.actor.ids().last() {
            self.actor.pause_one(last);
        }
        self.actor.make(&json!({}), Some(&format!("again-{name}")), false);
        self.actor.compare();
    }
}

struct Bench {
    host: Host,
    stem: String,
}

impl Bench {
    fn keys(&self, args: &[&str]) -> String {
        let file = self.host.runtime.dir().join("keys.json");
        let answer = self.host.runtime.clade(&[&["key"], args, &["--keys", file.to_str().unwrap()]].concat());
        assert_eq!(answer.code, Some(0), "{args:?}: {answer:?}");
        answer.stdout.trim().to_owned()
    }

    fn tenant(&self, name: &str, random: &mut Random) -> Arc<Tenant> {
        let digits: String = (0..20).filter_map(|_| char::from_digit(random.below(16) as u32, 16)).collect();
        let owner = format!("{name}-{}", &digits[..6]);
        let keys = [("all", "all"), ("read", "read")].map(|(ending, scope)| {
            self.keys(&["add", &format!("{owner}-{ending}"), "--owner", &owner, "--scope", scope])
        });
        Arc::new(Tenant::new(&owner, &self.host.address, keys, &format!("{name}-secret-{digits}")))
    }

    fn remove_keys(&self, tenant: &Tenant) {
        for ending in ["all", "read"] {
            self.keys(&["rm", &format!("{}-{ending}", tenant.owner)]);
        }
    }

    /// Returns the directory of kept checkpoints: the only one of the runtime directory's.
    fn kept(&self) -> PathBuf {
        let all = fs::read_dir(self.host.runtime.kept()).into_iter().flatten().flatten();
        all.map(|entry| entry.path()).next().unwrap_or_default()
    }

    /// Notes the names that only the host has: of processes, and of snapshots' checkpoints.
    fn publish(&self, tenant: &Tenant) {
        let pids = tenant.known().sandboxes.iter().map(|(id, _)| self.host.runtime.worker(id).to_string()).collect();
        tenant.known().pids = pids;
        for file in fs::read_dir(self.kept().join(".e2b-snapshots")).unwrap().flatten() {
            let record: Value = serde_json::from_slice(&fs::read(file.path()).unwrap()).unwrap_or_default();
            let Some(name) = record["id"].as_str().filter(|_| record["owner"] == tenant.owner) else { continue };
            tenant.secrets.add(name);
            let snapshots = &mut tenant.known().snapshots;
            if !snapshots.iter().any(|own| own == name) {
                snapshots.push(name.to_owned());
            }
        }
    }

    /// Returns all that the tenant and the host see of its sandboxes.
    fn portrait(&self, side: &mut Side) -> Vec<String> {
        let mut portrait = side.actor.portrait();
        for id in side.actor.ids() {
            let (status, vm) = self.host.runtime.http("GET", &format!("/v1/vms/{id}"), "");
            portrait.push(format!("{id}: {status} {} {} {}", vm["pid"], vm["state"], vm["labels"]));
        }
        portrait
    }

    fn held(&self) -> Held {
        let names = |path: &std::path::Path| {
            let all = fs::read_dir(path).into_iter().flatten().flatten();
            all.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<BTreeSet<_>>()
        };
        let (runtime, supervisor) = (&self.host.runtime, self.host.runtime.pid());
        let kept = self.kept();
        let dirs = [".e2b-snapshots", ".data", ""].map(|dir| kept.join(dir));
        let records = [runtime.dir().join("e2b/sandboxes")].into_iter().chain(dirs);
        let records = records.flat_map(|dir| names(&dir)).filter(|name| !name.starts_with('.'));
        let files = names(runtime.dir()).into_iter().filter(|name| !name.ends_with(".ended"));
        let files = files.filter(|name| runtime.dir().join(name) != runtime.kept());
        // A prepared worker is a socket and a process.
        let prepared = runtime.http("GET", "/v1/supervisor", "").1["prepared"].as_u64().unwrap() as usize;
        Held {
            descriptors: runtime.open_files(supervisor).saturating_sub(2 * prepared),
            mounts: fs::read_to_string(format!("/proc/{supervisor}/mountinfo")).unwrap().lines().count(),
            processes: runtime.clades().len().saturating_sub(prepared),
            files: files.chain(records).collect(),
            interfaces: names(std::path::Path::new("/sys/class/net"))
                .into_iter()
                .filter(|name| name.starts_with(&self.stem))
                .collect(),
        }
    }
}

/// Runs one side while the other is quiet, whose things stay as they are.
fn beside_a_quiet_one(bench: &Bench, side: &mut Side, quiet: &mut Side, calls: u64) {
    let (before, begun) = (bench.portrait(quiet), Instant::now());
    let most = side.tenant().count() + calls;
    side.run(most, || true);
    println!("{} made {calls} calls in {:?}", side.tenant().owner, begun.elapsed());
    let after = bench.portrait(quiet);
    assert_eq!(before, after, "{} has changed something of {}'s", side.tenant().owner, quiet.tenant().owner);
    quiet.actor.envs();
    quiet.actor.caller.client.rest();
}

fn tenants(calls: u64) {
    let rounds = (calls / 500).clamp(8, 100) as usize;
    if !kvm() {
        return;
    }
    let seed = std::env::var("CLADE_TENANT_SEED").ok().and_then(|seed| seed.parse().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed: u64 = seed.unwrap_or(now % 1_000_000_007);
    println!("CLADE_TENANT_SEED={seed}: {calls} calls each");
    let mut host = Host::new();
    let (claim, tap) = (Cid::take(), TapName::take());
    if !cached::agent(&mut host.runtime, &claim, &tap) {
        return;
    }
    host.runtime.clade(&["checkpoint", "web", "base", "--detach", "--json"]).json();
    let bench = Bench { host, stem: stem(&tap) };
    let mut random = Random::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let [alpha, beta] = ["alpha", "beta"].map(|name| bench.tenant(name, &mut random));
    let (mut a, mut b) = (Side::new(&alpha, &beta, seed), Side::new(&beta, &alpha, seed ^ 0xbeef));
    // Allocations that are made once stay.
    for side in [&mut a, &mut b] {
        side.settle();
        side.actor.end_all();
        side.actor.caller.client.rest();
    }
    thread::sleep(IDLE);
    let before = bench.held();
    let alone = latency::measure(&mut Caller::new(&beta, &alpha, seed), rounds);
    for side in [&mut a, &mut b] {
        side.settle();
        bench.publish(side.tenant());
    }
    beside_a_quiet_one(&bench, &mut a, &mut b, calls / 8);
    beside_a_quiet_one(&bench, &mut b, &mut a, calls / 8);
    // The measuring client of beta makes sandboxes that beta's model lacks: the model is quiet.
    let is_measured = AtomicBool::new(false);
    let beside = thread::scope(|scope| {
        let measured = scope.spawn(|| {
            let measured = latency::measure(&mut Caller::new(&beta, &alpha, seed), rounds);
            is_measured.store(true, Ordering::Relaxed);
            measured
        });
        let most = alpha.count() + calls / 8;
        a.run(most, || is_measured.load(Ordering::Relaxed) || measured.is_finished());
        measured.join().unwrap()
    });
    // Both at once: each compares its lists with its own model.
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| a.run(calls, || true));
        b.run(calls, || true);
    });
    println!("both made all of their calls {:?} after that", begun.elapsed());
    latency::print(&alone, &beside);
    alpha.print();
    beta.print();
    ends(&bench, a, b);
    wait_until("all that the tenants had to be given back", || {
        let after = bench.held();
        let (descriptors, processes) = (after.descriptors, after.processes);
        // A worker that was being prepared before is one of the processes then.
        let is_less = descriptors <= before.descriptors && processes <= before.processes;
        is_less && Held { descriptors, processes, ..before.clone() } == after || {
            println!("{after:?}\nbefore: {before:?}");
            thread::sleep(Duration::from_millis(500));
            false
        }
    });
    assert_eq!(bench.host.runtime.names(), ["web"]);
    let checkpoints = bench.host.runtime.http("GET", "/v1/checkpoints", "").1;
    let names: Vec<&str> =
        checkpoints.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str()).collect();
    assert_eq!(names, ["base"], "{checkpoints}");
    assert_eq!(bench.host.runtime.clade(&["stop", "web"]).code, Some(0));
    let findings = [alpha.findings(), beta.findings()].concat();
    assert!(findings.is_empty(), "wrong answers:\n{}", findings.join("\n\n"));
}

/// One tenant ends with its keys; the other's sandboxes go on, and then end.
fn ends(bench: &Bench, mut a: Side, mut b: Side) {
    let before = bench.portrait(&mut b);
    a.actor.end_all();
    bench.remove_keys(a.tenant());
    for key in [&a.tenant().manage, &a.tenant().read] {
        let (status, answer) = bench.host.call(key, "GET", "/v2/sandboxes", "");
        assert_eq!((status, &answer["code"]), (401, &json!(401)), "a key that was removed: {answer}");
    }
    assert_eq!(before, bench.portrait(&mut b), "the end of {} is {}'s", a.tenant().owner, b.tenant().owner);
    b.actor.envs();
    b.actor.compare();
    b.actor.end_all();
    bench.remove_keys(b.tenant());
}

#[test]
#[ignore = "takes a minute or two"]
fn neither_of_two_tenants_learns_of_the_other_or_changes_it() {
    tenants(1_500);
}

/// Makes `CLADE_TENANT_CALLS` calls of each tenant. `CLADE_TENANT_SEED` repeats a run, as far as
/// threads allow.
#[test]
#[ignore = "takes many minutes: CLADE_TENANT_CALLS bounds it"]
fn neither_of_two_tenants_learns_of_the_other_or_changes_it_for_long() {
    let calls = std::env::var("CLADE_TENANT_CALLS").ok().map(|calls| calls.parse().unwrap());
    tenants(calls.unwrap_or(100_000));
}
