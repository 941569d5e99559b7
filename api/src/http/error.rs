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

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self { kind, text } = self;
        let status = kind.status();
        let problem =
            Problem { kind: kind.urn(), title: kind.title().to_owned(), status: status.as_u16(), detail: text };
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
