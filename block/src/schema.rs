//! Schemas of types that are not this crate's.

use utoipa::ToSchema;

/// A time.
#[derive(ToSchema)]
#[expect(dead_code, reason = "the derived schema alone reads the fields")]
pub(crate) struct Time {
    secs: u64,
    nanos: u32,
}
