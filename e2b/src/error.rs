//! Errors as the SDKs expect them: a status, and `{"code", "message"}`.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use clade_agent_client::ClientError as AgentError;
use clade_api::{ClientError, ProblemKind};
use serde::Serialize;

/// The error answer of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GatewayError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

/// The body of an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ErrorBody {
    /// The HTTP status.
    pub(crate) code: u16,
    /// A description of this error.
    pub(crate) message: String,
}

impl GatewayError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(crate) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    pub(crate) fn no_sandbox(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no sandbox {id:?}"))
    }

    pub(crate) fn no_template(id: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no template {id:?}: no checkpoint has that name"))
    }

    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody { code: self.status.as_u16(), message: self.message.clone() }
    }
}

impl IntoResponse for GatewayError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(RETRY_AFTER, 1.into());
        }
        response
    }
}

impl From<ClientError> for GatewayError {
    /// A refusal by the supervisor or a VM's process keeps its status. An end during the request
    /// counts as busy.
    fn from(error: ClientError) -> Self {
        let status = match &error {
            ClientError::NoSuchVm { .. } | ClientError::Dead { .. } => StatusCode::NOT_FOUND,
            ClientError::Refused { status, problem } => match ProblemKind::of_urn(&problem.kind) {
                Some(ProblemKind::NotReady | ProblemKind::VmSilent | ProblemKind::VmGone | ProblemKind::Ending) => {
                    StatusCode::SERVICE_UNAVAILABLE
                }
                _ => StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            },
            ClientError::Name(_) => StatusCode::BAD_REQUEST,
            ClientError::NoSupervisor { .. } | ClientError::Silent { .. } | ClientError::Http(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

impl From<AgentError> for GatewayError {
    fn from(error: AgentError) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, format!("the agent in the sandbox: {error}"))
    }
}

impl From<JsonRejection> for GatewayError {
    fn from(rejection: JsonRejection) -> Self {
        Self::bad(rejection.body_text())
    }
}

impl From<QueryRejection> for GatewayError {
    fn from(rejection: QueryRejection) -> Self {
        Self::bad(rejection.body_text())
    }
}

/// The result of a handler.
pub(crate) type Answer<T> = Result<T, GatewayError>;
