//! Requests of servers in the supervisor's process, such as E2B's API: answered as those of the socket's
//! clients are, without HTTP.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::response::Response;
use clade_api::http::{ApiError, LAST_ANSWERS_OF_ALL, MAX_CONNECTIONS};
use clade_api::{
    CheckpointInfo, CheckpointRequest, Client, ClientError, ForkAnswer, ForkRequest, KeepRequest, LogsAnswer,
    MAX_ANSWER, MAX_ATTEMPTS, NetworkRequest, OpenRequest, Pending, ProblemKind, ResetAnswer, StopAnswer, StopRequest,
    SupervisorApi, SuspendAnswer, SuspendRequest, TtlInfo, TtlRequest, VmInfo, check_name, retried,
};
use hyper::{Method, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::Supervisor;
use crate::proxy::{MAX_INFO, ProxyLimits, forward, with_own_socket};

/// Requests at a time: as many as the socket has connections. Others wait.
const MAX_REQUESTS: u32 = MAX_CONNECTIONS as u32;

/// Requests in progress. The end of the supervisor waits for them, and refuses further ones.
#[derive(Debug)]
pub(crate) struct InProcessRequests(Semaphore);

impl Default for InProcessRequests {
    fn default() -> Self {
        Self(Semaphore::new(MAX_REQUESTS as usize))
    }
}

impl InProcessRequests {
    async fn begin(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.0.acquire().await.map_err(|_| ProblemKind::Ending.into())
    }

    /// Refuses further requests, and waits for those in progress. Afterwards the runtime directory may
    /// be another supervisor's.
    pub(crate) async fn close(&self) {
        // A request that comes now waits behind this, and is refused.
        let mut all = pin!(self.0.acquire_many(MAX_REQUESTS));
        let held = timeout(LAST_ANSWERS_OF_ALL, all.as_mut()).await;
        if held.is_err() {
            tracing::warn!("requests from within this process have not ended in time");
        }
        // Before the permits are given back: no request begins from here on.
        self.0.close();
    }
}

/// Parses the answer of a VM's process, which has up to `most` bytes and `limit` for all of them.
async fn parsed<T: DeserializeOwned>(answer: Response, most: usize, limit: Duration) -> Result<T, ClientError> {
    let status = answer.status();
    let Ok(bytes) = timeout(limit, to_bytes(answer.into_body(), most)).await else {
        return Err(ApiError::new(ProblemKind::VmSilent, "the answer of a VM's process does not end").into());
    };
    let bytes = bytes.map_err(|_| ClientError::LongAnswer { most })?;
    if status != StatusCode::OK {
        return Err(ClientError::refused(status, &bytes));
    }
    Ok(serde_json::from_slice(&bytes)?)
}

impl Supervisor {
    /// Answers a request for the VM or checkpoint `name`, repeatedly while its refusal may be temporary.
    fn pending<'a, T, E, F>(
        &'a self,
        method: Method,
        name: &'a str,
        request: impl FnMut() -> F + Send + 'a,
    ) -> Pending<'a, T>
    where
        T: Send + 'a,
        E: Into<ClientError>,
        F: Future<Output = Result<T, E>> + Send + 'a,
    {
        Box::pin(async move {
            check_name(name)?;
            self.repeated(method, request).await
        })
    }

    async fn repeated<T, E: Into<ClientError>, F: Future<Output = Result<T, E>>>(
        &self,
        method: Method,
        mut request: impl FnMut() -> F,
    ) -> Result<T, ClientError> {
        retried(MAX_ATTEMPTS, &method, || self.counted(&method, request())).await
    }

    /// Answers a request once, as the layers around the socket's handlers do.
    async fn counted<T, E: Into<ClientError>>(
        &self,
        method: &Method,
        answer: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ClientError> {
        let answer = self.noted(method, answer).await;
        self.0.requests.count(match &answer {
            Ok(_) => StatusCode::OK,
            Err(ClientError::Refused { status, .. }) => StatusCode::from_u16(*status).unwrap_or_default(),
            Err(error) => error.problem().status(),
        });
        answer
    }

    async fn noted<T, E: Into<ClientError>>(
        &self,
        method: &Method,
        answer: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ClientError> {
        let _request = self.0.in_process.begin().await?;
        if method.is_safe() {
            return answer.await.map_err(Into::into);
        }
        self.0.touch();
        let answer = answer.await.map_err(Into::into);
        self.0.touch();
        answer
    }

    /// Adds the time of a fork to the metrics.
    async fn timed(&self, fork: impl Future<Output = Result<ForkAnswer, ApiError>>) -> Result<ForkAnswer, ApiError> {
        let begun = Instant::now();
        let answer = fork.await;
        if answer.is_ok() {
            self.0.requests.forks.record(begun.elapsed());
        }
        answer
    }

    /// Has a VM's process answer, which may be compromised: in up to `most` bytes.
    async fn passed_on<T: DeserializeOwned>(
        &self,
        method: Method,
        vm: &str,
        action: &str,
        body: Option<&(impl Serialize + Sync)>,
        most: usize,
    ) -> Result<T, ClientError> {
        let _turn = self.0.forwarded_requests.begin(vm)?;
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder().method(method).uri(format!("/v1/vms/{vm}{action}"));
        let request = request.header(HOST, "localhost").header(CONTENT_TYPE, "application/json").body(Body::from(body));
        let request = request.map_err(|error| ApiError::new(ProblemKind::Internal, error.to_string()))?;
        let limits = ProxyLimits::default();
        let limit = limits.answer;
        parsed(forward(self.dir(), vm, request, limits).await?, most, limit).await
    }

    /// Has a VM's process reset it.
    ///
    /// # Errors
    /// When there is no such VM, or its process refuses.
    pub(super) async fn answer_reset(&self, name: &str) -> Result<ResetAnswer, ApiError> {
        check_name(name)?;
        let answer: ResetAnswer = self.passed_on(Method::POST, name, "/reset", None::<&()>, MAX_ANSWER).await?;
        let vm = with_own_socket(self.dir(), name.to_owned(), answer.vm).await?;
        Ok(ResetAnswer { vm, ..answer })
    }

    fn of_vm<'a, T: DeserializeOwned + Send + 'a>(
        &'a self,
        method: Method,
        vm: &'a str,
        action: &'static str,
        most: usize,
    ) -> Pending<'a, T> {
        self.pending(method.clone(), vm, move || {
            let method = method.clone();
            async move { self.passed_on(method, vm, action, None::<&()>, most).await }
        })
    }
}

impl SupervisorApi for Supervisor {
    fn vm_names(&self) -> Pending<'_, Vec<String>> {
        Box::pin(async { Client::new(self.dir()).names() })
    }

    fn vm<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo> {
        self.pending(Method::GET, vm, move || async move {
            let info = self.passed_on(Method::GET, vm, "", None::<&()>, MAX_INFO).await;
            // A description that cannot be read is an end of the VM to the socket's clients.
            let info = info.map_err(|error| match error {
                ClientError::Answer(_) | ClientError::LongAnswer { .. } => ClientError::from(ApiError::from(error)),
                error => error,
            });
            with_own_socket(self.dir(), vm.to_owned(), info?).await.map_err(ClientError::from)
        })
    }

    fn logs<'a>(&'a self, vm: &'a str) -> Pending<'a, LogsAnswer> {
        self.of_vm(Method::GET, vm, "/logs", MAX_ANSWER)
    }

    fn fork_vm<'a>(&'a self, vm: &'a str, request: ForkRequest) -> Pending<'a, ForkAnswer> {
        self.pending(Method::POST, vm, move || self.timed(self.answer_fork(vm.to_owned(), request.clone())))
    }

    fn pause<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo> {
        self.of_vm(Method::POST, vm, "/pause", MAX_INFO)
    }

    fn resume<'a>(&'a self, vm: &'a str) -> Pending<'a, VmInfo> {
        self.of_vm(Method::POST, vm, "/resume", MAX_INFO)
    }

    fn suspend<'a>(&'a self, vm: &'a str, request: SuspendRequest) -> Pending<'a, SuspendAnswer> {
        self.pending(Method::POST, vm, move || self.answer_suspend(vm.to_owned(), request.clone()))
    }

    fn stop<'a>(&'a self, vm: &'a str, request: StopRequest) -> Pending<'a, StopAnswer> {
        Box::pin(async move {
            match self.pending(Method::POST, vm, || self.answer_stop(vm, request)).await {
                // By the VM's process, or by the next supervisor: the VM would run on.
                Err(error) if error.problem() == ProblemKind::Ending => {
                    crate::stop(&Client::new(self.dir()).with_retries(), vm, request).await
                }
                answer => answer,
            }
        })
    }

    fn set_network<'a>(&'a self, vm: &'a str, request: NetworkRequest) -> Pending<'a, VmInfo> {
        self.pending(Method::POST, vm, move || self.answer_network(vm.to_owned(), request.clone()))
    }

    fn set_ttl<'a>(&'a self, vm: &'a str, request: TtlRequest) -> Pending<'a, TtlInfo> {
        self.pending(Method::PUT, vm, move || async move {
            self.passed_on(Method::PUT, vm, "/ttl", Some(&request), MAX_INFO).await
        })
    }

    fn remove_ttl<'a>(&'a self, vm: &'a str) -> Pending<'a, TtlInfo> {
        self.of_vm(Method::DELETE, vm, "/ttl", MAX_INFO)
    }

    fn checkpoints(&self) -> Pending<'_, Vec<CheckpointInfo>> {
        Box::pin(self.repeated(Method::GET, || async { Ok::<_, ApiError>(Supervisor::checkpoints(self).list()) }))
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo> {
        self.pending(Method::GET, checkpoint, move || async move {
            Supervisor::checkpoints(self).info(checkpoint).map_err(ApiError::from)
        })
    }

    fn take_checkpoint<'a>(&'a self, vm: &'a str, request: CheckpointRequest) -> Pending<'a, CheckpointInfo> {
        self.pending(Method::POST, vm, move || self.answer_checkpoint(vm.to_owned(), request.clone()))
    }

    fn open_checkpoint(&self, request: OpenRequest) -> Pending<'_, CheckpointInfo> {
        Box::pin(self.repeated(Method::POST, move || self.answer_open(request.clone())))
    }

    fn keep_checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo> {
        self.pending(Method::POST, checkpoint, move || self.answer_keep(checkpoint.to_owned(), KeepRequest::default()))
    }

    fn remove_checkpoint<'a>(&'a self, checkpoint: &'a str) -> Pending<'a, CheckpointInfo> {
        self.pending(Method::DELETE, checkpoint, move || self.answer_remove(checkpoint.to_owned()))
    }

    fn fork_checkpoint<'a>(&'a self, checkpoint: &'a str, request: ForkRequest) -> Pending<'a, ForkAnswer> {
        self.pending(Method::POST, checkpoint, move || {
            self.timed(self.answer_fork_of_checkpoint(checkpoint.to_owned(), request.clone()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::advance;

    use super::*;

    /// The body of an answer that has begun, and does not go on.
    struct Endless;

    impl hyper::body::Body for Endless {
        type Data = axum::body::Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
            std::task::Poll::Pending
        }
    }

    /// Has the other tasks run until they wait.
    async fn settled() {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_waits_for_requests_in_progress_and_refuses_further_ones() {
        let second = Duration::from_secs(1);
        for ends in [true, false] {
            let requests = Arc::<InProcessRequests>::default();
            let first = requests.begin().await.unwrap();
            let of = Arc::clone(&requests);
            let closes = tokio::spawn(async move { of.close().await });
            settled().await;
            // Another one waits behind the end, which waits for the first, and is refused with it.
            let of = Arc::clone(&requests);
            let next = tokio::spawn(async move { of.begin().await.map(drop).map_err(|error| error.kind) });
            advance(LAST_ANSWERS_OF_ALL - second).await;
            settled().await;
            assert!(!closes.is_finished() && !next.is_finished(), "a request is in progress");
            // The first ends, or is waited for no longer.
            let first = Some(first).filter(|_| !ends);
            advance(if ends { Duration::ZERO } else { 2 * second }).await;
            closes.await.unwrap();
            assert_eq!(next.await.unwrap(), Err(ProblemKind::Ending));
            assert_eq!(requests.begin().await.map(drop).map_err(|error| error.kind), Err(ProblemKind::Ending));
            drop(first);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_end_is_that_of_a_silent_vm() {
        let answer = Response::builder().status(StatusCode::OK).body(Body::new(Endless)).unwrap();
        let begun = tokio::time::Instant::now();
        let refused = parsed::<u64>(answer, 8, Duration::from_secs(70)).await.unwrap_err();
        assert_eq!((refused.problem(), begun.elapsed().as_secs()), (ProblemKind::VmSilent, 70));
    }

    #[tokio::test]
    async fn an_answer_of_a_vms_process_is_bounded_and_a_refusal_keeps_its_status() {
        let answer = |status: StatusCode, body: &str| {
            Response::builder().status(status).body(Body::from(body.to_owned())).unwrap()
        };
        let limit = Duration::from_secs(70);
        let of = async |status, body: &str| parsed::<u64>(answer(status, body), 8, limit).await;
        assert_eq!(of(StatusCode::OK, "12345678").await.unwrap(), 12_345_678);
        assert!(matches!(of(StatusCode::OK, "123456789").await, Err(ClientError::LongAnswer { most: 8 })));
        assert!(matches!(of(StatusCode::OK, "{").await, Err(ClientError::Answer(_))));
        // HTTP itself has refused it: there is no problem document.
        let refused = of(StatusCode::IM_A_TEAPOT, "no").await;
        assert!(matches!(refused, Err(ClientError::Refused { status: 418, .. })), "{refused:?}");
        assert!(matches!(of(StatusCode::IM_A_TEAPOT, "123456789").await, Err(ClientError::LongAnswer { most: 8 })));
    }
}
