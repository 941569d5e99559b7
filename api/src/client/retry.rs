//! Repetition of requests that are refused for now.

use std::future::Future;
use std::time::Duration;

use hyper::Method;
use tokio::time::sleep;

use super::ClientError;

/// Most attempts of a request whose refusal may be temporary.
pub const MAX_ATTEMPTS: u32 = 6;
/// The pause after the first refusal. Each further pause is twice as long: three seconds in all.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Sends a request of `method` up to `attempts` times, while its refusal may be temporary: if nothing
/// was done, or if the request changes nothing.
///
/// # Errors
/// The error of the last attempt.
pub async fn retried<T, F: Future<Output = Result<T, ClientError>>>(
    attempts: u32,
    method: &Method,
    mut request: impl FnMut() -> F,
) -> Result<T, ClientError> {
    for attempt in 1..attempts {
        // Gone before the pause: not every answer may be held across threads.
        {
            let answer = request().await;
            if !answer.as_ref().is_err_and(|error| error.may_pass(method)) {
                return answer;
            }
        }
        sleep(FIRST_PAUSE * 2_u32.pow(attempt - 1)).await;
    }
    request().await
}
