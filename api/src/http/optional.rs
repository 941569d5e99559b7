//! A JSON body that may be left out.

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::ApiError;
use crate::ProblemKind;

/// The body of a request. None if it is empty.
#[derive(Debug)]
pub struct Optional<T>(pub Option<T>);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Optional<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let (head, body) = request.into_parts();
        let unreadable = |error: axum::Error| ApiError::new(ProblemKind::BadRequest, error.to_string());
        let collected = body.collect().await.map_err(|error| unreadable(error).into_response())?;
        let bytes: Bytes = collected.to_bytes();
        if bytes.is_empty() {
            return Ok(Self(None));
        }
        match Json::from_request(Request::from_parts(head, Body::from(bytes)), state).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(rejection) => Err(ApiError::from(rejection).into_response()),
        }
    }
}
