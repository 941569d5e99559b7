//! Errors as problem details (RFC 9457).

use axum::body::Body;
use axum::extract::rejection::JsonRejection;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use crate::client::ClientError;
use crate::error::DaemonError;
use crate::problem::{Problem, ProblemKind};

/// The media type of an error answer.
pub const PROBLEM_TYPE: &str = "application/problem+json";

/// An error of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// Its kind.
    pub kind: ProblemKind,
    /// The error in words, with its causes.
    pub text: String,
}

impl ApiError {
    /// Returns an error of a kind.
    pub fn new(kind: ProblemKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

impl From<ProblemKind> for ApiError {
    /// Returns an error with no more text than its title.
    fn from(kind: ProblemKind) -> Self {
        Self::new(kind, kind.title())
    }
}

impl ApiError {
    fn into_problem(self) -> Problem {
        let Self { kind, text } = self;
        Problem { kind: kind.urn(), title: kind.title().to_owned(), status: kind.status().as_u16(), detail: text }
    }
}

impl From<ApiError> for ClientError {
    /// Returns the error as a client gets it.
    fn from(error: ApiError) -> Self {
        let status = error.kind.status().as_u16();
        Self::Refused { status, problem: Box::new(error.into_problem()) }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let kind = self.kind;
        let status = kind.status();
        let problem = self.into_problem();
        // Texts and a number: serialization cannot fail.
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = (status, Body::from(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_TYPE));
        if kind == ProblemKind::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"clade\""));
        }
        if kind == ProblemKind::TooManyLogins {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<DaemonError> for ApiError {
    fn from(error: DaemonError) -> Self {
        Self { kind: error.problem(), text: clade_vmm::error_chain(&error) }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let kind = match rejection {
            JsonRejection::MissingJsonContentType(_) => ProblemKind::MediaType,
            _ => ProblemKind::BadRequest,
        };
        Self::new(kind, rejection.body_text())
    }
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> Self {
        Self { kind: error.problem(), text: clade_vmm::error_chain(&error) }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    /// A server in the supervisor's process gets the errors that a client of the socket gets.
    #[tokio::test]
    async fn an_error_is_the_same_with_and_without_http() {
        for kind in ProblemKind::ALL.iter().copied() {
            let error = ApiError::new(kind, "text");
            let response = error.clone().into_response();
            let status = response.status();
            let bytes = to_bytes(response.into_body(), 1 << 16).await.unwrap();
            let (by_http, direct) = (ClientError::refused(status, &bytes), ClientError::from(error.clone()));
            let parts = |error: &ClientError| match error {
                ClientError::Refused { status, problem } => (*status, problem.clone()),
                other => panic!("{other:?}"),
            };
            assert_eq!(parts(&by_http), parts(&direct));
            assert_eq!(ApiError::from(direct), error);
        }
    }
}
