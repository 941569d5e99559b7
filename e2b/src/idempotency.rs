//! Calls that are made twice with one `Idempotency-Key`: a sandbox is made once.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Mutex as AsyncMutex;

use crate::error::{Answer, ApiError};
use crate::wire::Sandbox;

/// How long an answer is kept.
const KEPT: Duration = Duration::from_secs(600);
/// Most answers that are kept. The oldest go first.
const MAX_KEPT: usize = 4096;
/// Most bytes of a key.
const MAX_KEY: usize = 255;

type Slot = Arc<AsyncMutex<Option<Sandbox>>>;

#[derive(Debug)]
struct Kept {
    owner: String,
    key: String,
    since: Instant,
    answer: Slot,
}

/// The answers of calls that may come again.
#[derive(Debug, Default)]
pub(crate) struct Replays(Mutex<VecDeque<Kept>>);

impl Replays {
    fn slot(&self, owner: &str, key: &str) -> Slot {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while all.len() >= MAX_KEPT || all.front().is_some_and(|kept| kept.since.elapsed() > KEPT) {
            all.pop_front();
        }
        if let Some(kept) = all.iter().find(|kept| kept.owner == owner && kept.key == key) {
            return Arc::clone(&kept.answer);
        }
        let answer = Slot::default();
        let (owner, key) = (owner.to_owned(), key.to_owned());
        all.push_back(Kept { owner, key, since: Instant::now(), answer: Arc::clone(&answer) });
        answer
    }

    /// Runs `work`, or answers what it answered for this key. A call that comes meanwhile waits. What
    /// failed is run again.
    pub(crate) async fn once(
        &self,
        owner: &str,
        key: Option<&str>,
        work: impl Future<Output = Answer<Sandbox>>,
    ) -> Answer<Sandbox> {
        let Some(key) = key else { return work.await };
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(ApiError::bad(format!("Idempotency-Key has 1 to {MAX_KEY} characters, not {}", key.len())));
        }
        let slot = self.slot(owner, key);
        let mut answer = slot.lock().await;
        if let Some(sandbox) = &*answer {
            return Ok(sandbox.clone());
        }
        let sandbox = work.await?;
        *answer = Some(sandbox.clone());
        Ok(sandbox)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::wire::{CLIENT_ID, ENVD_VERSION};

    fn sandbox(number: usize) -> Sandbox {
        Sandbox {
            template: "base".to_owned(),
            id: number.to_string(),
            client: CLIENT_ID,
            envd_version: ENVD_VERSION,
            envd_access_token: String::new(),
            traffic_access_token: None,
            domain: None,
        }
    }

    #[tokio::test]
    async fn the_same_key_makes_one_sandbox_for_each_owner() {
        let (replays, made) = (Replays::default(), AtomicUsize::new(0));
        let make = async |owner: &str, key: Option<&str>| {
            let work = async {
                tokio::task::yield_now().await;
                Ok(sandbox(made.fetch_add(1, Ordering::Relaxed)))
            };
            replays.once(owner, key, work).await.unwrap().id
        };
        let both = tokio::join!(make("one", Some("k")), make("one", Some("k")));
        assert_eq!(both, ("0".to_owned(), "0".to_owned()));
        assert_eq!(make("two", Some("k")).await, "1");
        assert_eq!(make("one", Some("l")).await, "2");
        assert_eq!((make("one", None).await, make("one", None).await), ("3".to_owned(), "4".to_owned()));
        let failed = replays.once("one", Some("f"), async { Err(ApiError::internal("no")) }).await;
        assert_eq!(failed.unwrap_err().message, "no");
        assert_eq!(make("one", Some("f")).await, "5");
        let long = "x".repeat(MAX_KEY + 1);
        assert!(replays.once("one", Some(&long), async { Ok(sandbox(9)) }).await.is_err());
    }
}
