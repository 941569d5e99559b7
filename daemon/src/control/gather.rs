//! The numbers of many VMs, each from its own process. One that hangs holds up nobody.

use std::io;
use std::time::Duration;

use hyper::Method;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::control::client::{Client, ClientError};
use crate::control::memory::VmStats;
use crate::fleet::check_name;

/// VMs that are asked at a time.
const MAX_ASKED: usize = 32;
/// How long a VM may take. On a busy host a VM's process may wait for its turn for a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// How long all of them may take: less than a client of the metrics waits.
const ALL_TIMEOUT: Duration = Duration::from_secs(8);

/// The VMs that have answered.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    /// Their numbers, by name.
    pub vms: Vec<VmStats>,
    /// The names of those that are there and have not answered in time.
    pub silent: Vec<String>,
}

impl Gathered {
    fn take(&mut self, name: String, answer: Option<Result<VmStats, ClientError>>) {
        match answer {
            // By the name that it was asked by, whatever it says.
            Some(Ok(stats)) => self.vms.push(VmStats { name, ..stats }),
            // It has ended meanwhile, a dead process has left its socket, or it is another user's.
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
    /// The names of VMs with a socket in the directory, sorted. Some may have died.
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

    /// The numbers of the VMs called `names`. One that does not answer within 4 s is left out and
    /// named, as are those that are not asked within 8 s.
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

    /// Sockets that take connections and say nothing, as those of stopped processes.
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
        // The clock is the test's: it goes to the next time-out when nothing else is to be done.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let (gathered, took) = runtime.block_on(async {
            let begun = Instant::now();
            (client.gather(names).await, begun.elapsed())
        });
        // Two batches, each of which takes its whole time; the VMs behind them are not asked.
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
