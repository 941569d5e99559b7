//! Error answers: problem details (RFC 9457) as `application/problem+json`.

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The beginning of every problem's type.
const URN: &str = "urn:clade:";

/// Declares [`ProblemKind`]: each kind's name in its URN, its status and its title.
macro_rules! kinds {
    ($($kind:ident $slug:literal $status:ident $title:literal,)+) => {
        /// A kind of error. Its name in a problem's `type` does not change between versions.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[non_exhaustive]
        pub enum ProblemKind {
            $(#[doc = $title] $kind,)+
        }

        impl ProblemKind {
            /// All kinds.
            pub const ALL: &[Self] = &[$(Self::$kind,)+];

            /// The last part of its URN.
            #[must_use]
            pub fn slug(self) -> &'static str {
                match self { $(Self::$kind => $slug,)+ }
            }

            /// The HTTP status of its answers.
            #[must_use]
            pub fn status(self) -> StatusCode {
                match self { $(Self::$kind => StatusCode::$status,)+ }
            }

            /// A short description.
            #[must_use]
            pub fn title(self) -> &'static str {
                match self { $(Self::$kind => $title,)+ }
            }
        }
    };
}

kinds! {
    BadRequest "bad-request" BAD_REQUEST "The request is not valid.",
    BadName "bad-name" BAD_REQUEST "The text is not a name, or names all children the same.",
    BadCount "bad-count" BAD_REQUEST "The number is out of range.",
    BadPath "bad-path" BAD_REQUEST "The path cannot be used.",
    BadAddress "bad-address" BAD_REQUEST "The range is not all in the guest's memory.",
    BadConfig "bad-config" BAD_REQUEST "No VM can be made of the configuration, its files or its kernel.",
    Unauthorized "unauthorized" UNAUTHORIZED "The token is missing or wrong.",
    BadHost "bad-host" FORBIDDEN "The Host header is neither an IP address nor localhost.",
    ForeignOrigin "foreign-origin" FORBIDDEN "The request of a browser is not the page's.",
    Forbidden "forbidden" FORBIDDEN "The VM is another user's.",
    NoSuchPath "no-such-path" NOT_FOUND "There is no such path.",
    NoSuchVm "no-such-vm" NOT_FOUND "There is no such VM.",
    NoSuchCheckpoint "no-such-checkpoint" NOT_FOUND "There is no such checkpoint.",
    MethodNotAllowed "method-not-allowed" METHOD_NOT_ALLOWED "The path is not for that method.",
    LateBody "late-body" REQUEST_TIMEOUT "The body did not come in time.",
    NameTaken "name-taken" CONFLICT "The name is taken.",
    IdentityTaken "identity-taken" CONFLICT "An interface, address or socket is taken or cannot be had.",
    WrongState "wrong-state" CONFLICT "The VM is not in a state for the request.",
    NotReady "not-ready" CONFLICT "The guest's agent does not answer, or could not make it another VM.",
    NoDevice "no-device" CONFLICT "The VM has no such device.",
    SnapshotConflict "snapshot-conflict" CONFLICT "The snapshot does not fit what is in its place.",
    Cancelled "cancelled" CONFLICT "The request was cancelled, and nothing of it is left.",
    Ending "ending" CONFLICT "The process is ending.",
    VmGone "vm-gone" GONE "The VM's process has ended, or its answer cannot be read.",
    BodyTooLarge "body-too-large" PAYLOAD_TOO_LARGE "The body is too large.",
    MediaType "media-type" UNSUPPORTED_MEDIA_TYPE "The body is not declared as what it must be.",
    KeyReused "key-reused" UNPROCESSABLE_ENTITY "The idempotency key is another request's.",
    TooManyLogins "too-many-logins" TOO_MANY_REQUESTS "There were too many wrong tokens just now.",
    Internal "internal" INTERNAL_SERVER_ERROR "The request has failed.",
    NoThread "no-thread" SERVICE_UNAVAILABLE "There is no thread for the request.",
    TooMany "too-many" SERVICE_UNAVAILABLE "There are too many such requests.",
    VmSilent "vm-silent" GATEWAY_TIMEOUT "The VM's process does not answer in time.",
    NoRoom "no-room" INSUFFICIENT_STORAGE "There is no room on the host.",
}

impl ProblemKind {
    /// Returns the problem's `type`.
    #[must_use]
    pub fn urn(self) -> String {
        format!("{URN}{}", self.slug())
    }

    /// Returns the kind of a `type`, if there is such a kind.
    #[must_use]
    pub fn of_urn(urn: &str) -> Option<Self> {
        let slug = urn.strip_prefix(URN)?;
        Self::ALL.iter().copied().find(|kind| kind.slug() == slug)
    }
}

/// The body of an error answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The URN of its kind.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its kind in words.
    pub title: String,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// This error in words, with its causes.
    pub detail: String,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_kind_has_a_urn_of_its_own_and_is_an_error() {
        let urns: BTreeSet<String> = ProblemKind::ALL.iter().map(|kind| kind.urn()).collect();
        assert_eq!(urns.len(), ProblemKind::ALL.len());
        for kind in ProblemKind::ALL.iter().copied() {
            assert_eq!(ProblemKind::of_urn(&kind.urn()), Some(kind));
            assert!(kind.status().is_client_error() || kind.status().is_server_error(), "{kind:?}");
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.slug(), "between processes as in a problem");
        }
        assert_eq!(ProblemKind::of_urn("about:blank"), None);
    }

    #[test]
    fn each_kind_is_in_the_documentation() {
        let text = include_str!("../../docs/api.md");
        for kind in ProblemKind::ALL {
            let row = format!("| {} | `{}` |", kind.status().as_u16(), kind.slug());
            assert!(text.contains(&row), "no row {row:?}");
        }
    }
}
