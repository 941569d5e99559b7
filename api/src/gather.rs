//! The numbers of many VMs, each from its own process. A hanging process does not delay the others.

use std::io;
use std::time::Duration;

use hyper::Method;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::{Client, ClientError, VmStats, check_name};

/// VMs asked at a time.
const MAX_ASKED: usize = 32;
/// Time limit of one VM. On a busy host a VM's process may wait for its turn for a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Time limit of all VMs: less than a client of the metrics waits.
const ALL_TIMEOUT: Duration = Duration::from_secs(8);

/// The VMs that have answered.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    /// Their numbers, by name.
    pub vms: Vec<VmStats>,
    /// Names of running VMs that have not answered in time.
    pub silent: Vec<String>,
}

impl Gathered {
    fn take(&mut self, name: String, answer: Option<Result<VmStats, ClientError>>) {
        match answer {
            // By the requested name, not by the answer's.
            Some(Ok(stats)) if stats.is_plausible() => self.vms.push(VmStats { name, ..stats }),
            Some(Ok(_)) => {
                tracing::warn!(name, "the numbers of a VM cannot be its own");
                self.silent.push(name);
            }
            // The VM has ended meanwhile, a dead process has left its socket, or it is another
            // user's.
            Some(Err(
                ClientError::NoSuchVm { .. }
                | ClientError::Dead { .. }
                | ClientError::Forbidden { .. }
                | ClientError::Refused { status: 404, .. },
            )) => {}
            Some(Err(error)) => {
                tracing::warn!(%error, name, "a VM does not answer");
                self.silent.push(name);
            }
            None => self.silent.push(name),
        }
    }
}

impl Client {
    /// Returns the names of VMs with a socket in the directory, sorted. Some may have died.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>, ClientError> {
        let failed = |source| ClientError::Directory { path: self.dir().to_owned(), source };
        let entries = match std::fs::read_dir(self.dir()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.file_name();
            let name = file.to_str().and_then(|file| file.strip_suffix(".sock"));
            names.extend(name.filter(|name| check_name(name).is_ok()).map(str::to_owned));
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Gathers the numbers of the VMs called `names`. VMs that do not answer within 4 s, or are not
    /// asked within 8 s, are listed as silent.
    pub async fn gather(&self, names: Vec<String>) -> Gathered {
        let deadline = Instant::now() + ALL_TIMEOUT;
        let mut gathered = Gathered::default();
        let mut asked: JoinSet<(String, Option<Result<VmStats, ClientError>>)> = JoinSet::new();
        let mut waiting = names.into_iter();
        loop {
            while asked.len() < MAX_ASKED && Instant::now() < deadline {
                let Some(name) = waiting.next() else { break };
                let client = self.clone();
                asked.spawn(async move {
                    let answer = client.request::<VmStats>(Method::GET, &name, "/stats", None::<&()>);
                    let answer = timeout_at(deadline, timeout(ANSWER_TIMEOUT, answer)).await;
                    (name, answer.ok().and_then(Result::ok))
                });
            }
            match asked.join_next().await {
                Some(Ok((name, answer))) => gathered.take(name, answer),
                Some(Err(error)) => tracing::warn!(%error, "a VM is left out"),
                None => break,
            }
        }
        gathered.silent.extend(waiting);
        gathered.vms.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        gathered.silent.sort_unstable();
        gathered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn stats(change: impl FnOnce(&mut serde_json::Value)) -> VmStats {
        let zeros =
            |keys: &[&str]| keys.iter().map(|key| ((*key).to_owned(), 0.into())).collect::<serde_json::Map<_, _>>();
        let histogram = serde_json::json!({"count": 0, "sum_us": 0, "buckets": []});
        let mut memory = zeros(&["private_kib", "alone_pages", "unknown_pages", "mappings", "table_kib"]);
        memory.insert("pages".into(), zeros(&["absent", "reference", "shared", "exclusive", "pinned"]).into());
        memory.insert("layers".into(), serde_json::json!([]));
        let mut stats = serde_json::json!({
            "name": "other", "pid": 1, "state": "running", "parent": null, "generation": 0, "age_s": 1.0,
            "memory": memory,
            "copies": zeros(&["guest", "pin", "adopt", "freeze", "freeze_pinned", "freeze_ahead"]),
            "pins": zeros(&["now", "reading", "locked", "long", "long_total", "longest_s"]),
            "pauses": {"fork": histogram, "snapshot": histogram, "reset": histogram},
        });
        change(&mut stats);
        serde_json::from_value(stats).unwrap()
    }

    #[test]
    fn numbers_that_no_vm_has_are_those_of_a_silent_one() {
        let net = |tap: &str| {
            serde_json::json!({"tap": tap, "mac": "02:00:00:00:00:01", "received_bytes": 0, "sent_bytes": 0,
                "dropped": 0})
        };
        let changed = |key: &'static str, value: serde_json::Value| stats(move |stats| stats[key] = value);
        let buckets = vec![(0, 0); 100];
        let many = changed("nets", serde_json::Value::Array(vec![net("tap0"); 100]));
        for (stats, is_taken) in [
            (stats(|_| {}), true),
            (changed("parent", "web".into()), true),
            (changed("nets", serde_json::json!([net("tap0"), net("")])), true),
            (changed("parent", "a\nb".into()), false),
            (changed("parent", "x".repeat(1 << 20).into()), false),
            (changed("nets", serde_json::json!([net(&"x".repeat(1 << 20))])), false),
            (many, false),
            (stats(|stats| stats["pauses"]["reset"]["buckets"] = serde_json::json!(buckets)), false),
        ] {
            let mut gathered = Gathered::default();
            gathered.take("web".to_owned(), Some(Ok(stats)));
            let names: Vec<&str> = gathered.vms.iter().map(|vm| vm.name.as_str()).collect();
            assert_eq!((names, gathered.silent.is_empty()), (if is_taken { vec!["web"] } else { vec![] }, is_taken));
        }
    }

    /// Sockets that accept connections and never answer, as those of stopped processes.
    #[test]
    fn however_many_vms_are_silent_it_takes_a_bounded_time() {
        let dir = tempfile::tempdir().unwrap();
        let count = 6 * MAX_ASKED;
        let name = |n: usize| format!("vm-{n:03}");
        let silent: Vec<_> =
            (0..count).map(|n| UnixListener::bind(dir.path().join(format!("{}.sock", name(n)))).unwrap()).collect();
        let client = Client::new(dir.path());
        let names = client.names().unwrap();
        assert_eq!(names.len(), count);
        // The test's clock jumps to the next time-out when no task can run.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let (gathered, took) = runtime.block_on(async {
            let begun = Instant::now();
            (client.gather(names).await, begun.elapsed())
        });
        // Two batches take their whole time; the VMs behind them are not asked.
        assert_eq!(took.as_secs(), ALL_TIMEOUT.as_secs());
        assert!(gathered.vms.is_empty() && gathered.silent == (0..count).map(name).collect::<Vec<_>>());
        let waiting = |listener: &UnixListener| {
            listener.set_nonblocking(true).unwrap();
            listener.accept().is_ok()
        };
        let asked = silent.iter().filter(|listener| waiting(listener)).count();
        assert_eq!(asked, 2 * MAX_ASKED, "of {count}");
    }
}
