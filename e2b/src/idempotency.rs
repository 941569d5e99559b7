//! Repeated calls with one `Idempotency-Key`: sandboxes and snapshots are made once.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use crate::change_client::ChangeClient;
use crate::error::{Answer, GatewayError};

/// Lifetime of a kept answer.
const KEPT: Duration = Duration::from_secs(600);
/// Most calls with keys of one owner, in progress or answered. The owner's oldest answers go first.
const MAX_KEPT: usize = 1024;
/// Most bytes of one owner's kept answers, in the same way.
const MAX_KEPT_BYTES: usize = 4 << 20;
/// Most bytes of a key.
const MAX_KEY: usize = 255;

/// The answer of a call, in JSON, once there is one. The call that makes the answer holds the lock.
type Slot = Arc<AsyncMutex<Option<Arc<str>>>>;

/// The result of a call that makes something.
pub(crate) trait Made: Serialize {
    /// Whether anything was made. If not, the call has failed.
    fn has_made(&self) -> bool {
        true
    }
}

/// A call with an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyedCall {
    key: String,
    /// The SHA-256 of the call's path and body.
    digest: [u8; 32],
}

impl KeyedCall {
    /// Returns a call with its key. None without one.
    ///
    /// # Errors
    /// 400 for a key of another length, or with characters outside of ASCII.
    pub(crate) fn of(headers: &HeaderMap, path: &str, body: &[u8]) -> Answer<Option<Self>> {
        let Some(key) = headers.get("idempotency-key") else { return Ok(None) };
        let key = key.to_str().ok().filter(|key| (1..=MAX_KEY).contains(&key.len())).ok_or_else(|| {
            let bytes = key.as_bytes().len();
            GatewayError::bad(format!("Idempotency-Key has 1 to {MAX_KEY} characters of ASCII, not {bytes} bytes"))
        })?;
        // A path has no NUL.
        let digest = Sha256::new().chain_update(path).chain_update([0]).chain_update(body).finalize().into();
        Ok(Some(Self { key: key.to_owned(), digest }))
    }
}

#[derive(Debug)]
struct Kept {
    call: KeyedCall,
    slot: Slot,
    /// The time and the length of its answer.
    answered: Option<(Instant, usize)>,
}

impl Kept {
    /// Whether a call in progress has the slot. Slots are cloned under the lock of all, and so this is exact
    /// there.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.slot) > 1
    }

    fn is_over(&self) -> bool {
        !self.is_used() && self.answered.is_none_or(|(at, _)| at.elapsed() > KEPT)
    }
}

/// The answers of calls that may be repeated, by owner.
#[derive(Debug, Default)]
pub(crate) struct Replays(Mutex<BTreeMap<String, VecDeque<Kept>>>);

impl Replays {
    fn owners(&self) -> MutexGuard<'_, BTreeMap<String, VecDeque<Kept>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, owner: &str, call: KeyedCall) -> Answer<Slot> {
        let mut owners = self.owners();
        owners.retain(|other, all| {
            if other == owner {
                // A failed call may be repeated with another body.
                all.retain(|kept| !kept.is_over());
            } else {
                while all.front().is_some_and(Kept::is_over) {
                    all.pop_front();
                }
            }
            !all.is_empty()
        });
        let all = owners.entry(owner.to_owned()).or_default();
        if let Some(kept) = all.iter().find(|kept| kept.call.key == call.key) {
            if kept.call != call {
                let why = format!("Idempotency-Key {:?} was used for another request", call.key);
                return Err(GatewayError::new(StatusCode::UNPROCESSABLE_ENTITY, why));
            }
            return Ok(Arc::clone(&kept.slot));
        }
        if all.len() >= MAX_KEPT && !forget_oldest(all) {
            let why = format!("{MAX_KEPT} calls with an Idempotency-Key are in progress");
            return Err(GatewayError::new(StatusCode::TOO_MANY_REQUESTS, why));
        }
        let slot = Slot::default();
        all.push_back(Kept { call, slot: Arc::clone(&slot), answered: None });
        Ok(slot)
    }

    /// Notes the answer in a slot.
    fn answered(&self, owner: &str, slot: &Slot, bytes: usize) {
        let mut owners = self.owners();
        let Some(all) = owners.get_mut(owner) else { return };
        if let Some(kept) = all.iter_mut().find(|kept| Arc::ptr_eq(&kept.slot, slot)) {
            kept.answered = Some((Instant::now(), bytes));
        }
        let bytes = |all: &VecDeque<Kept>| -> usize {
            all.iter().filter_map(|kept| kept.answered).map(|(_, bytes)| bytes).sum()
        };
        while bytes(all) > MAX_KEPT_BYTES && forget_oldest(all) {}
    }

    /// Runs `work`, or returns the earlier answer to this call. A call that comes meanwhile waits, unless its
    /// client goes. Failed work is run again.
    pub(crate) async fn once<T: Made, F: Future<Output = Answer<T>>>(
        &self,
        owner: &str,
        call: Option<KeyedCall>,
        mut client: ChangeClient,
        work: impl FnOnce(ChangeClient) -> F,
    ) -> Answer<Arc<str>> {
        let json = |made: &T| {
            serde_json::to_string(made).map(Arc::from).map_err(|error| GatewayError::internal(error.to_string()))
        };
        let Some(call) = call else { return json(&work(client).await?) };
        let slot = self.slot(owner, call)?;
        let mut answer = client.waits_for(async { Ok(slot.lock().await) }).await?;
        if let Some(answer) = &*answer {
            return Ok(Arc::clone(answer));
        }
        let made = work(ChangeClient::repeating()).await?;
        let text: Arc<str> = json(&made)?;
        if made.has_made() {
            *answer = Some(Arc::clone(&text));
            self.answered(owner, &slot, text.len());
        }
        Ok(text)
    }
}

/// Forgets the oldest answer of an owner. Returns false without one.
fn forget_oldest(all: &mut VecDeque<Kept>) -> bool {
    let oldest = all.iter().position(|kept| !kept.is_used());
    oldest.and_then(|oldest| all.remove(oldest)).is_some()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    impl Made for usize {}

    impl Made for Vec<usize> {
        fn has_made(&self) -> bool {
            !self.is_empty()
        }
    }

    fn call(key: &str, path: &str, body: &str) -> Option<KeyedCall> {
        let headers = [("idempotency-key", key)].map(|(name, key)| (name.parse().unwrap(), key.parse().unwrap()));
        KeyedCall::of(&headers.into_iter().collect(), path, body.as_bytes()).unwrap()
    }

    async fn once<T: Made>(replays: &Replays, owner: &str, call: Option<KeyedCall>, made: Answer<T>) -> Answer<String> {
        let answer = replays.once(owner, call, ChangeClient::repeating(), async |_| {
            tokio::task::yield_now().await;
            made
        });
        answer.await.map(|answer| answer.to_string())
    }

    #[tokio::test]
    async fn the_same_key_makes_one_sandbox_for_each_owner() {
        let (replays, made) = (Replays::default(), AtomicUsize::new(0));
        let make = async |owner: &str, key: Option<&str>| {
            let call = key.and_then(|key| call(key, "/", "{}"));
            let work = async |_| {
                tokio::task::yield_now().await;
                Ok(made.fetch_add(1, Ordering::Relaxed))
            };
            replays.once(owner, call, ChangeClient::repeating(), work).await.unwrap().to_string()
        };
        assert_eq!(tokio::join!(make("one", Some("k")), make("one", Some("k"))), ("0".to_owned(), "0".to_owned()));
        assert_eq!(make("two", Some("k")).await, "1");
        assert_eq!(make("one", Some("l")).await, "2");
        assert_eq!((make("one", None).await, make("one", None).await), ("3".to_owned(), "4".to_owned()));
        let failed = once::<usize>(&replays, "one", call("f", "/", "{}"), Err(GatewayError::internal("no"))).await;
        assert_eq!(failed.unwrap_err().message, "no");
        assert_eq!(make("one", Some("f")).await, "5");
    }

    #[test]
    fn a_key_has_a_length_and_characters() {
        let of = |key: Option<&[u8]>| {
            let mut headers = HeaderMap::new();
            if let Some(key) = key {
                headers.insert("idempotency-key", key.try_into().unwrap());
            }
            KeyedCall::of(&headers, "/", b"").map_err(|error| error.status.as_u16()).map(|call| call.is_some())
        };
        let (longest, long) = ("x".repeat(MAX_KEY), "x".repeat(MAX_KEY + 1));
        assert_eq!((of(None), of(Some(b"k")), of(Some(longest.as_bytes()))), (Ok(false), Ok(true), Ok(true)));
        for wrong in [&b""[..], "\u{e9}".as_bytes(), long.as_bytes()] {
            assert_eq!(of(Some(wrong)), Err(400), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn a_key_is_for_one_request_and_evicts_no_other_owners() {
        let replays = Replays::default();
        let make = async |owner: &str, key: &str, body: &str, number: usize| {
            let made = once(&replays, owner, call(key, "/", body), Ok(number)).await;
            made.map(|made| made.parse::<usize>().unwrap()).map_err(|error| error.status.as_u16())
        };
        assert_eq!(make("one", "k", "a", 1).await, Ok(1));
        assert_eq!(make("one", "k", "b", 2).await, Err(422));
        assert_eq!(make("one", "k", "a", 3).await, Ok(1));
        let elsewhere = once(&replays, "one", call("k", "/other", "a"), Ok(3_usize)).await;
        assert_eq!(elsewhere.unwrap_err().status.as_u16(), 422);
        // A call with another body does not wait for one in progress, even if that has not begun.
        let slot = replays.slot("one", call("w", "/", "a").unwrap()).unwrap();
        assert_eq!(make("one", "w", "b", 4).await, Err(422));
        drop(slot);
        assert_eq!(make("one", "w", "b", 5).await, Ok(5));
        // Work that has made nothing has failed.
        assert_eq!(once(&replays, "one", call("n", "/", "a"), Ok(Vec::<usize>::new())).await.unwrap(), "[]");
        assert_eq!(make("one", "n", "b", 6).await, Ok(6));
        for number in 0..MAX_KEPT + 1 {
            make("two", &number.to_string(), "", number).await.unwrap();
        }
        assert_eq!(make("one", "k", "a", 6).await, Ok(1));
        assert_eq!(make("two", "0", "", 7).await, Ok(7), "the owner's own oldest has gone");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_kept_for_a_time_and_a_call_in_progress_until_its_end() {
        let replays = Replays::default();
        let make = async |key: &str, number: usize| once(&replays, "one", call(key, "/", ""), Ok(number)).await;
        let slot = replays.slot("one", call("slow", "/", "").unwrap()).unwrap();
        make("fast", 1).await.unwrap();
        tokio::time::advance(KEPT / 2).await;
        // The owner's other calls do not evict one in progress.
        for number in 0..MAX_KEPT {
            make(&number.to_string(), number).await.unwrap();
        }
        tokio::time::advance(KEPT).await;
        assert!(Arc::ptr_eq(&slot, &replays.slot("one", call("slow", "/", "").unwrap()).unwrap()));
        replays.answered("one", &slot, 1);
        *slot.lock().await = Some("2".into());
        drop(slot);
        tokio::time::advance(KEPT).await;
        assert_eq!(make("slow", 3).await.unwrap(), "2", "since its answer");
        assert_eq!(make("fast", 3).await.unwrap(), "3");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(make("slow", 4).await.unwrap(), "4");
        // As many calls in progress are the limit, and another owner's forget those that are over.
        let slots: Vec<Slot> = (0..MAX_KEPT)
            .map(|number| replays.slot("two", call(&number.to_string(), "/", "").unwrap()).unwrap())
            .collect();
        let refused = replays.slot("two", call("more", "/", "").unwrap());
        assert_eq!(refused.unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
        drop(slots);
        tokio::time::advance(KEPT * 2).await;
        make("fast", 5).await.unwrap();
        assert_eq!(replays.owners().keys().collect::<Vec<_>>(), ["one"]);
    }

    #[tokio::test]
    async fn kept_answers_have_a_size() {
        let replays = Replays::default();
        let long: Vec<usize> = vec![usize::MAX; MAX_KEPT_BYTES / 50];
        let make =
            async |key: &str, made: Vec<usize>| once(&replays, "one", call(key, "/", ""), Ok(made)).await.unwrap();
        for key in ["a", "b", "c"] {
            make(key, long.clone()).await;
        }
        assert_eq!((make("a", vec![1]).await, make("c", vec![1]).await.len() > 100), ("[1]".to_owned(), true));
    }

    #[tokio::test]
    async fn who_waits_for_anothers_answer_waits_no_longer_than_its_client() {
        let replays = Replays::default();
        let slot = replays.slot("one", call("k", "/", "").unwrap()).unwrap();
        let making = slot.lock().await;
        let (there, client) = ChangeClient::new();
        let waits = replays.once("one", call("k", "/", ""), client, async |_| Ok(1_usize));
        let goes = async {
            tokio::task::yield_now().await;
            drop(there);
        };
        let (waited, ()) = tokio::join!(waits, goes);
        assert_eq!(waited.unwrap_err().status, StatusCode::SERVICE_UNAVAILABLE);
        drop(making);
    }
}
