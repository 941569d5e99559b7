//! Lists of VMs, as a client sees them.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use hyper::Method;
use tokio::task::{JoinError, JoinSet};
use tokio::time::error::Elapsed;
use tokio::time::timeout_at;

use super::{Client, ClientError};
use crate::{EndedVm, ProblemKind, VmInfo, ended_vms};

/// VMs asked at a time for a list of all.
const MAX_ASKED: usize = 32;

/// Time limit of each answer. A VM stopped by a debugger delays the list no longer. A process whose
/// connections are all idle takes 10 s to cut one.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);

/// The VMs that answer.
#[derive(Clone, Debug, Default)]
pub struct ListedVms {
    /// Those of this user.
    pub vms: Vec<VmInfo>,
    /// Number of sockets of other users.
    pub forbidden: usize,
    /// The names of VMs whose processes have not answered in time.
    pub silent: Vec<String>,
}

type Answered = (Result<Result<VmInfo, ClientError>, Elapsed>, String);

impl ListedVms {
    fn extend(&mut self, answer: Option<Result<Answered, JoinError>>) {
        match answer {
            // By the requested name, not by the answer's.
            Some(Ok((Ok(Ok(info)), name))) => self.vms.push(VmInfo { name, ..info }),
            Some(Ok((Ok(Err(ClientError::Forbidden { .. })), _))) => self.forbidden += 1,
            Some(Ok((Ok(Err(error @ ClientError::LongAnswer { .. })), name))) => {
                tracing::warn!(%error, name, "a VM's process describes its VM at too great a length");
                self.silent.push(name);
            }
            // By a supervisor, which has waited for its process.
            Some(Ok((Ok(Err(error)), name))) if error.problem() == ProblemKind::VmSilent => self.silent.push(name),
            // The VM has ended meanwhile, or a dead process has left its socket.
            Some(Ok((Ok(Err(error)), name))) => tracing::debug!(%error, name, "does not answer"),
            Some(Ok((Err(_), name))) => self.silent.push(name),
            Some(Err(error)) => tracing::warn!(%error, "a VM is left out"),
            None => {}
        }
    }
}

impl Client {
    /// Returns the names of all VMs. Without a supervisor behind a port, some may have died.
    ///
    /// # Errors
    /// When the directory cannot be read, or the supervisor refuses.
    pub async fn all_names(&self) -> Result<Vec<String>, ClientError> {
        if !self.is_remote() {
            return self.names();
        }
        match self.supervisor(Method::GET, "/v1/names", None::<&()>).await {
            // A supervisor of an earlier version.
            Err(ClientError::Refused { status: 404, .. }) => {
                let vms: Vec<VmInfo> = self.supervisor(Method::GET, "/v1/vms", None::<&()>).await?;
                Ok(vms.into_iter().map(|vm| vm.name).collect())
            }
            answer => answer,
        }
    }

    /// Returns the recorded VMs that ended by themselves.
    ///
    /// # Errors
    /// When the directory cannot be read, or the supervisor refuses.
    pub async fn ended(&self) -> Result<Vec<EndedVm>, ClientError> {
        if self.is_remote() {
            return self.supervisor(Method::GET, "/v1/ended", None::<&()>).await;
        }
        Ok(ended_vms(&self.dir)?)
    }

    /// Returns all VMs of this user that answer within 15 s each.
    ///
    /// # Errors
    /// When the directory of sockets cannot be read.
    pub async fn list(&self) -> Result<ListedVms, ClientError> {
        self.list_within(None).await
    }

    /// Returns all VMs of this user that answer within `limit` together, or within 15 s each.
    ///
    /// # Errors
    /// As for [`Client::list`].
    pub async fn list_within(&self, limit: Option<Duration>) -> Result<ListedVms, ClientError> {
        if !self.is_remote() {
            return Ok(self.ask_each(ListedVms::default(), self.names()?, limit).await);
        }
        let vms: Vec<VmInfo> = self.supervisor(Method::GET, "/v1/vms", None::<&()>).await?;
        // The supervisor's list has those that answer. The others are asked again: some have ended since.
        let known: HashSet<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
        let others = self.all_names().await?.into_iter().filter(|name| !known.contains(name.as_str())).collect();
        Ok(self.ask_each(ListedVms { vms, ..ListedVms::default() }, others, limit).await)
    }

    /// Adds the VMs called `names` to `all`.
    async fn ask_each(&self, mut all: ListedVms, names: Vec<String>, limit: Option<Duration>) -> ListedVms {
        let mut asked = JoinSet::new();
        let mut names = names.into_iter();
        let deadline = limit.map(|limit| Instant::now() + limit);
        let due = || deadline.unwrap_or_else(|| Instant::now() + LIST_TIMEOUT);
        loop {
            while asked.len() < MAX_ASKED && Instant::now() < due() {
                let Some(name) = names.next() else { break };
                let (client, due) = (self.clone(), due());
                asked.spawn(async move { (timeout_at(due.into(), client.listed(&name)).await, name) });
            }
            let Some(answer) = asked.join_next().await else { break };
            all.extend(Some(answer));
        }
        all.silent.extend(names);
        for name in &all.silent {
            tracing::debug!(name, "does not answer in time");
        }
        all.vms.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        all.silent.sort_unstable();
        all
    }
}
