//! JSON objects only: for a structure, serde also takes an array, and an empty one if all its
//! fields are optional.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

fn expect<E: Error>(value: &Value) -> Result<(), E> {
    if value.is_object() { Ok(()) } else { Err(E::custom(format!("{value} is no object"))) }
}

/// Deserializes a structure from an object.
pub(crate) fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<T, D::Error> {
    let value = Value::deserialize(from)?;
    expect(&value)?;
    T::deserialize(value).map_err(Error::custom)
}

/// Deserializes a structure from an object, or None from null.
pub(crate) fn optional<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Option<T>, D::Error> {
    let value = Value::deserialize(from)?;
    if value.is_null() {
        return Ok(None);
    }
    expect(&value)?;
    T::deserialize(value).map(Some).map_err(Error::custom)
}

/// Deserializes structures from an array of objects.
pub(crate) fn list<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<Vec<T>, D::Error> {
    let values = Vec::<Value>::deserialize(from)?;
    values.iter().try_for_each(expect)?;
    values.into_iter().map(|value| T::deserialize(value).map_err(Error::custom)).collect()
}

/// Returns whether a body's first character begins an object.
pub(crate) fn begins_object(body: &[u8]) -> bool {
    body.trim_ascii_start().first() == Some(&b'{')
}

#[cfg(test)]
mod tests {
    use crate::{BootRequest, ForkRequest, RestoreRequest};

    #[test]
    fn an_array_is_no_object() {
        let fork = |text: &str| serde_json::from_str::<ForkRequest>(text).map(drop).map_err(|error| error.to_string());
        for good in ["{}", r#"{"vsock": null}"#, r#"{"vsock": {}}"#, r#"{"nets": [{}, {}]}"#] {
            fork(good).unwrap();
        }
        for bad in [r#"{"vsock": []}"#, r#"{"nets": [{}, []]}"#, r#"{"nets": {}}"#] {
            assert!(fork(bad).is_err(), "{bad}");
        }
        let restore = r#"{"saved": {"dir": "/a"}, "vms": []}"#;
        let refused = serde_json::from_str::<RestoreRequest>(restore).unwrap_err().to_string();
        assert!(refused.contains("[] is no object"), "{refused}");
        let saved = r#"{"saved": ["/a", "lazy", null]}"#;
        assert!(serde_json::from_str::<RestoreRequest>(saved).is_err());
        let limits = serde_json::from_str::<BootRequest>(r#"{"limits": []}"#).unwrap_err().to_string();
        assert!(limits.contains("[] is no object"), "{limits}");
        assert!(super::begins_object(b" \n{}") && !super::begins_object(b"[]") && !super::begins_object(b""));
    }
}
