//! Repeated calls with one `Idempotency-Key`: a sandbox is made once.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use sha2::{Digest, Sha256};

use tokio::sync::Mutex as AsyncMutex;

use crate::error::{Answer, GatewayError};
use crate::wire::Sandbox;

/// Lifetime of a kept answer.
const KEPT: Duration = Duration::from_secs(600);
/// Most answers kept for one owner. The owner's oldest go first.
const MAX_KEPT: usize = 1024;
/// Most bytes of a key.
const MAX_KEY: usize = 255;

type Slot = Arc<AsyncMutex<Option<Sandbox>>>;

#[derive(Debug)]
struct Kept {
    key: String,
    /// The SHA-256 of the call's body.
    body: [u8; 32],
    since: Instant,
    answer: Slot,
}

/// The answers of calls that may be repeated, by owner.
#[derive(Debug, Default)]
pub(crate) struct Replays(Mutex<BTreeMap<String, VecDeque<Kept>>>);

impl Replays {
    fn slot(&self, owner: &str, key: &str, body: &[u8]) -> Answer<Slot> {
        let body = Sha256::digest(body).into();
        let mut owners = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|_, all| {
            while all.front().is_some_and(|kept| kept.since.elapsed() > KEPT) {
                all.pop_front();
            }
            !all.is_empty()
        });
        let all = owners.entry(owner.to_owned()).or_default();
        if let Some(kept) = all.iter_mut().find(|kept| kept.key == key) {
            // A failed call may be repeated with another body.
            let has_failed = kept.answer.try_lock().is_ok_and(|answer| answer.is_none());
            if kept.body != body && !has_failed {
                let why = format!("Idempotency-Key {key:?} was used for another request");
                return Err(GatewayError::new(StatusCode::UNPROCESSABLE_ENTITY, why));
            }
            kept.body = body;
            return Ok(Arc::clone(&kept.answer));
        }
        if all.len() >= MAX_KEPT {
            all.pop_front();
        }
        let answer = Slot::default();
        all.push_back(Kept { key: key.to_owned(), body, since: Instant::now(), answer: Arc::clone(&answer) });
        Ok(answer)
    }

    /// Runs `work`, or returns its earlier answer for this key and this body. A call that comes
    /// meanwhile waits. Failed work is run again.
    pub(crate) async fn once(
        &self,
        owner: &str,
        key: Option<&str>,
        body: &[u8],
        work: impl Future<Output = Answer<Sandbox>>,
    ) -> Answer<Sandbox> {
        let Some(key) = key else { return work.await };
        if key.is_empty() || key.len() > MAX_KEY {
            return Err(GatewayError::bad(format!("Idempotency-Key has 1 to {MAX_KEY} characters, not {}", key.len())));
        }
        let slot = self.slot(owner, key, body)?;
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
            replays.once(owner, key, b"{}", work).await.unwrap().id
        };
        let both = tokio::join!(make("one", Some("k")), make("one", Some("k")));
        assert_eq!(both, ("0".to_owned(), "0".to_owned()));
        assert_eq!(make("two", Some("k")).await, "1");
        assert_eq!(make("one", Some("l")).await, "2");
        assert_eq!((make("one", None).await, make("one", None).await), ("3".to_owned(), "4".to_owned()));
        let failed = replays.once("one", Some("f"), b"{}", async { Err(GatewayError::internal("no")) }).await;
        assert_eq!(failed.unwrap_err().message, "no");
        assert_eq!(make("one", Some("f")).await, "5");
        let long = "x".repeat(MAX_KEY + 1);
        assert!(replays.once("one", Some(&long), b"{}", async { Ok(sandbox(9)) }).await.is_err());
    }

    #[tokio::test]
    async fn a_key_is_for_one_request_and_evicts_no_other_owners() {
        let replays = Replays::default();
        let make = async |owner: &str, key: &str, body: &str, number: usize| {
            let made = replays.once(owner, Some(key), body.as_bytes(), async { Ok(sandbox(number)) }).await;
            made.map(|one| one.id).map_err(|error| error.status.as_u16())
        };
        assert_eq!(make("one", "k", "a", 1).await, Ok("1".to_owned()));
        assert_eq!(make("one", "k", "b", 2).await, Err(422));
        assert_eq!(make("one", "k", "a", 3).await, Ok("1".to_owned()));
        // A call with another body does not wait for one in progress.
        let under_way = replays.once("one", Some("w"), b"a", async {
            assert_eq!(make("one", "w", "b", 4).await, Err(422));
            Err(GatewayError::internal("no"))
        });
        under_way.await.unwrap_err();
        assert_eq!(make("one", "w", "b", 5).await, Ok("5".to_owned()));
        for number in 0..MAX_KEPT + 1 {
            make("two", &number.to_string(), "", number).await.unwrap();
        }
        assert_eq!(make("one", "k", "a", 6).await, Ok("1".to_owned()));
        assert_eq!(make("two", "0", "", 7).await, Ok("7".to_owned()), "the owner's own oldest has gone");
    }
}
