//! Forks, checkpoints, stops and kills at random, after which no resource is held.

use clade_test_support::Patience;

use super::*;

/// Resources in use, which must be the same after a storm as before.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    files: BTreeSet<String>,
    descriptors: usize,
    /// Their names.
    threads: Vec<String>,
    /// Descriptors of the remaining VM: its layers vary.
    of_vm: usize,
}

/// Returns the names of a process's threads.
fn threads(pid: u32) -> Vec<String> {
    let all = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let mut names: Vec<_> = all.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect();
    names.sort_unstable();
    names.into_iter().map(|name| name.trim().to_owned()).collect()
}

impl Left {
    fn now(all: &Supervised) -> Self {
        let count = |pid: u32, what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
        let supervisor = all.info("pid") as u32;
        // A prepared worker is a socket and a process.
        let prepared = 2 * all.info("prepared") as usize;
        Self {
            files: all.files().into_iter().filter(|file| !file.ends_with(".ended")).collect(),
            descriptors: count(supervisor, "fd").saturating_sub(prepared),
            threads: threads(supervisor),
            of_vm: count(all.pid_of("web"), "fd"),
        }
    }

    fn is_back_to(&self, before: &Self) -> bool {
        self.files == before.files
            && self.descriptors <= before.descriptors
            && self.threads.len() <= before.threads.len()
            && self.of_vm <= before.of_vm + 8
    }
}

/// Forks, checkpoints, stops and kills at random. Returns the counts of answers by status.
fn storm(all: &Supervised, seed: u64, until: std::time::Instant) -> std::collections::BTreeMap<u16, u64> {
    let mut random = seed;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let mut answers = std::collections::BTreeMap::<u16, u64>::new();
    let mut patience = Patience::new(std::time::Duration::from_secs(3600));
    // At least as long as requested, and until some requests have been granted.
    while std::time::Instant::now() < until || answers.get(&200) <= Some(&3) {
        assert!(patience.tick(), "{answers:?}");
        let (_, vms) = all.http("GET", "/v1/vms", "");
        let vms: Vec<(String, u32)> = vms.as_array().map_or(Vec::new(), |all| {
            let one = |vm: &Value| (vm["name"].as_str().unwrap().to_owned(), vm["pid"].as_u64().unwrap() as u32);
            all.iter().map(one).filter(|(name, _)| name != "web").collect()
        });
        let (_, checkpoints) = all.http("GET", "/v1/checkpoints", "");
        let checkpoints: Vec<&str> =
            checkpoints.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        let vm = vms.get(below(vms.len().max(1) as u64) as usize);
        let name = vm.map_or("web", |(name, _)| name.as_str());
        let checkpoint = checkpoints.get(below(checkpoints.len().max(1) as u64) as usize).copied().unwrap_or("none");
        let fork = format!(r#"{{"count":{},"paused":{}}}"#, 1 + below(3), below(4) > 0);
        let act = if vms.len() > 12 { 4 } else { below(13) };
        let (method, path, body) = match act {
            0 => ("POST", format!("/v1/vms/{name}/fork"), fork),
            1 => ("POST", "/v1/vms/web/fork".to_owned(), fork),
            2 => ("POST", format!("/v1/checkpoints/{checkpoint}/fork"), fork),
            3 if checkpoints.len() < 6 => ("POST", format!("/v1/vms/{name}/checkpoint"), "{}".to_owned()),
            3 | 9 => ("DELETE", format!("/v1/checkpoints/{checkpoint}"), String::new()),
            4 | 5 => ("POST", format!("/v1/vms/{name}/stop"), String::new()),
            6 => ("POST", format!("/v1/vms/{name}/pause"), String::new()),
            7 => ("POST", format!("/v1/checkpoints/{checkpoint}/prepare"), r#"{"count":2}"#.to_owned()),
            8 => {
                // Never web, and never an unrelated process with a reused pid.
                if let Some((_, pid)) = vm.filter(|(_, pid)| all.processes().contains(pid)) {
                    kill(*pid, Signal::KILL);
                }
                continue;
            }
            10 if below(8) == 0 => {
                all.zygotes_killed();
                continue;
            }
            11 => {
                // Of its line or not.
                ("POST", format!("/v1/vms/{name}/rollback"), format!(r#"{{"checkpoint":"{checkpoint}"}}"#))
            }
            _ => ("GET", format!("/v1/vms/{name}"), String::new()),
        };
        if name == "web" && ["/stop", "/pause"].iter().any(|end| path.ends_with(end)) {
            continue;
        }
        let (status, answer) = all.http(method, &path, &body);
        *answers.entry(status).or_default() += 1;
        // Gone, in the wrong state, refused for now, silent, or its process was killed during the
        // request: these are valid answers. A 500 must report the end of a process.
        let killed = answer["detail"].as_str().is_some_and(|error| error.contains("process") || error.contains("gone"));
        assert!(
            [200, 404, 409, 410, 503, 504, 507].contains(&status) || status == 500 && killed,
            "{method} {path}: {status} {answer}"
        );
    }
    answers
}

impl Supervised {
    /// Kills the current zygote: the parent of the workers and a child of the supervisor.
    fn zygotes_killed(&self) {
        let supervisor = self.info("pid").to_string();
        let parent = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1).map(str::to_owned))
        };
        let zygote = self.processes().into_iter().find(|pid| parent(*pid).as_ref() == Some(&supervisor));
        if let Some(zygote) = zygote {
            kill(zygote, Signal::KILL);
        }
    }

    fn storm(&self, threads: u64, seconds: u64) {
        let run = |seconds: u64, round: u64| {
            let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
            let answers = std::thread::scope(|scope| {
                let all: Vec<_> =
                    (0..threads).map(|thread| scope.spawn(move || storm(self, thread + 1000 * round, until))).collect();
                all.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            println!("answers: {answers:?}");
            for one in self.http("GET", "/v1/checkpoints", "").1.as_array().unwrap() {
                self.http("DELETE", &format!("/v1/checkpoints/{}", one["name"].as_str().unwrap()), "");
            }
            wait_until("all to be stopped", || {
                let vms = self.vms();
                let left = vms.iter().filter_map(|vm| vm["name"].as_str()).filter(|name| *name != "web");
                left.filter(|name| self.runtime.clade(&["stop", name]).code.is_some()).count() == 0
            });
        };
        run(2, 0);
        // Threads for blocking work go after ten idle seconds, and prepared workers stay for a
        // minute: this supervisor keeps none.
        let settled = |before: Option<&Left>| {
            wait_until("what was taken to be given back", || {
                let left = Left::now(self);
                let is_back = before.is_none_or(|before| left.is_back_to(before));
                if !is_back {
                    println!("{left:?}\nbefore: {before:?}");
                }
                is_back
            });
        };
        // Whether or not the last zygote was killed, a zygote runs afterwards: it starts one of the
        // children at least, and the prepared workers the others.
        let probe = || {
            let count = self.info("prepared") + 1;
            self.fork(&["web", "--count", &count.to_string()]).iter().for_each(|child| self.stop(child));
        };
        probe();
        std::thread::sleep(std::time::Duration::from_secs(12));
        let before = Left::now(self);
        run(seconds, 1);
        probe();
        settled(Some(&before));
        // Supervisor, zygote, web, and the prepared workers.
        wait_until("all other processes to end", || self.processes().len() == 3 + self.info("prepared") as usize);
    }
}

#[test]
fn forks_checkpoints_and_kills_at_random_leave_nothing() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &[]);
    all.storm(4, 4);
    all.end();
}

#[test]
#[ignore = "takes minutes"]
fn forks_checkpoints_and_kills_at_random_leave_nothing_for_long() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("2");
    all.boot("web", &[]);
    all.storm(8, 120);
    all.end();
}
