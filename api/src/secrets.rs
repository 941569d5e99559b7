//! Secrets of a VM: bytes that its children may be made without.
//!
//! The request that makes a VM names its secrets. The VM's process keeps them, sends them only with
//! the VM's image, and writes them nowhere. For a child without secrets, all of its memory is
//! searched for them ([`clade_memory::GuestRam::erase`]); its process forgets them before the
//! child's first instruction.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::iter;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clade_memory::check_secret;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;
use zeroize::Zeroizing;

use crate::{DaemonError, ProblemKind, hex, random_hex};

/// Most secrets of a VM.
pub(crate) const MAX_SECRETS: usize = 16;
/// Most bytes of all secrets of a VM.
pub const MAX_SECRET_BYTES: usize = 16 << 10;
/// Longest name of a secret.
const MAX_NAME: usize = 64;

/// Secret bytes, and their name.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// The name in answers and errors.
    #[schema(min_length = 1, max_length = 64)]
    pub name: String,
    /// The bytes in base64: 16 to 4,096.
    #[serde(serialize_with = "encode", deserialize_with = "decode")]
    #[schema(value_type = String)]
    pub value: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({:?}, {} bytes)", self.name, self.value.len())
    }
}

fn encode<S: Serializer>(value: &Zeroizing<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&Zeroizing::new(BASE64_STANDARD.encode(value)))
}

fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Zeroizing<Vec<u8>>, D::Error> {
    let text = Zeroizing::new(String::deserialize(deserializer)?);
    // The decoder's error would show a byte of the secret.
    BASE64_STANDARD.decode(&*text).map(Zeroizing::new).map_err(|_| de::Error::custom("a secret's value is no base64"))
}

/// Deserializes secrets from an array of objects. Errors show nothing of their values.
pub fn list<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Secret>, D::Error> {
    let values = Vec::<Value>::deserialize(from)?;
    let secret = |value: Value| {
        // Errors for other types would show the value.
        let is_one = value.is_object() && value.get("value").is_none_or(Value::is_string);
        let wrong = || de::Error::custom("a secret is an object with a name and a value in base64");
        if is_one { Secret::deserialize(value).map_err(de::Error::custom) } else { Err(wrong()) }
    };
    values.into_iter().map(secret).collect()
}

/// The known secrets of a VM.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Secrets {
    /// No secret was named, or the list is unknown: a snapshot does not keep it.
    #[default]
    None,
    /// Secrets that may be in its memory.
    Held(Vec<Secret>),
    /// The VM was made without its parent's secrets.
    Withheld,
}

impl Secrets {
    /// Returns the state of a VM that is booted with these secrets.
    pub fn of(secrets: Vec<Secret>) -> Self {
        if secrets.is_empty() { Self::None } else { Self::Held(secrets) }
    }

    fn held(&self) -> &[Secret] {
        match self {
            Self::Held(secrets) => secrets,
            Self::None | Self::Withheld => &[],
        }
    }

    /// Returns the names of the secrets.
    pub fn names(&self) -> Vec<String> {
        self.held().iter().map(|secret| secret.name.clone()).collect()
    }

    /// Returns the values of the secrets.
    pub fn bytes(&self) -> Vec<&[u8]> {
        self.held().iter().map(|secret| secret.value.as_slice()).collect()
    }

    /// Checks that children of `vm`, or of a snapshot, can be made without them.
    ///
    /// # Errors
    /// When the list of secrets is unknown.
    pub fn expect_known(&self, vm: Option<&str>) -> Result<(), DaemonError> {
        if !matches!(self, Self::None) {
            return Ok(());
        }
        let of = vm.map_or_else(|| "a snapshot".to_owned(), |vm| format!("{vm:?}"));
        let text = format!("no child of {of} can be made without secrets: it was made with none that are known");
        Err(DaemonError::Refused { kind: ProblemKind::WrongState, text })
    }
}

/// The recorded state of a VM's secrets, from which no secret can be read.
///
/// The VM's process keeps the list itself, and a guest that breaks out of its VM could shorten it:
/// children made without secrets would then have them. The supervisor compares the list with this.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretsRecord {
    /// As [`Secrets::None`].
    #[default]
    None,
    /// The salted digest of [`Secrets::Held`].
    Held {
        /// The salt, in hexadecimal.
        salt: String,
        /// The digest, in hexadecimal.
        digest: String,
    },
    /// As [`Secrets::Withheld`].
    Withheld,
}

impl SecretsRecord {
    /// Records `secrets`.
    ///
    /// # Errors
    /// When the kernel has no random bytes.
    pub fn of(secrets: &Secrets) -> io::Result<Self> {
        Ok(match secrets {
            Secrets::None => Self::None,
            Secrets::Withheld => Self::Withheld,
            Secrets::Held(list) => {
                let salt = random_hex::<32>()?;
                let digest = digest(&salt, list);
                Self::Held { salt, digest }
            }
        })
    }

    /// The record of a child, made without secrets if `withhold`.
    pub fn of_child(&self, withhold: bool) -> Self {
        if withhold { Self::Withheld } else { self.clone() }
    }

    /// Whether this is the record of `secrets`.
    pub fn is_of(&self, secrets: &Secrets) -> bool {
        match (self, secrets) {
            (Self::None, Secrets::None) | (Self::Withheld, Secrets::Withheld) => true,
            (Self::Held { salt, digest: recorded }, Secrets::Held(list)) => *recorded == digest(salt, list),
            _ => false,
        }
    }
}

/// The SHA-256 of a salt and a list, in hexadecimal.
fn digest(salt: &str, list: &[Secret]) -> String {
    let mut hash = Sha256::new();
    for part in iter::once(salt.as_bytes()).chain(list.iter().flat_map(|one| [one.name.as_bytes(), &one.value])) {
        // With its length: no two lists have the same bytes.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

/// Checks the secrets of a new VM.
///
/// # Errors
/// When a secret has no name, or another's. When there are too many, or one cannot be found in
/// memory.
pub fn check(secrets: &[Secret]) -> Result<(), DaemonError> {
    let refused = |text: String| Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text });
    let bytes: usize = secrets.iter().map(|secret| secret.value.len()).sum();
    if secrets.len() > MAX_SECRETS || bytes > MAX_SECRET_BYTES {
        let count = secrets.len();
        return refused(format!("{count} secrets of {bytes} bytes: at most {MAX_SECRETS} of {MAX_SECRET_BYTES} bytes"));
    }
    let mut names = BTreeSet::new();
    for secret in secrets {
        let name = &secret.name;
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return refused(format!("secret {name:?}: a name has 1 to {MAX_NAME} bytes, and no control characters"));
        }
        if !names.insert(name) {
            return refused(format!("secret {name:?}: there are two of that name"));
        }
        if let Err(error) = check_secret(&secret.value) {
            return refused(format!("secret {name:?}: {error}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str, value: &[u8]) -> Secret {
        Secret { name: name.to_owned(), value: Zeroizing::new(value.to_vec()) }
    }

    #[test]
    fn a_secret_is_said_by_its_name_alone() {
        let token = secret("token", b"correct horse battery staple");
        let said = format!("{:?} {:?}", token, Secrets::of(vec![token.clone()]));
        assert!(said.contains("\"token\", 28 bytes") && !said.contains("horse"), "{said}");
        let text = serde_json::to_string(&token).unwrap();
        assert_eq!(serde_json::from_str::<Secret>(&text).unwrap(), token);
        let wrong = text.replace("Y29y", "%29y");
        let error = serde_json::from_str::<Secret>(&wrong).unwrap_err().to_string();
        assert!(error.contains("no base64") && !error.contains('%'), "{error}");
        for wrong in [r#"["plain"]"#, r#"[{"name": "a", "value": ["plain"]}]"#, r#"[["a", "plain"]]"#] {
            let error = list(&mut serde_json::Deserializer::from_str(wrong)).unwrap_err().to_string();
            assert!(error.contains("a secret is an object") && !error.contains("plain"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_kept_from_a_child_is_refused_by_its_name() {
        let good = b"correct horse battery staple".as_slice();
        let refused = |secrets: &[Secret]| match check(secrets) {
            Err(DaemonError::Refused { kind: ProblemKind::BadConfig, text }) => text,
            other => panic!("{other:?}"),
        };
        check(&[secret("a", good), secret("b", good)]).unwrap();
        assert!(refused(&[secret("a", &good[..15])]).contains("\"a\": a secret of 15 bytes"));
        assert!(refused(&[secret("a", good), secret("a", good)]).contains("two of that name"));
        assert!(refused(&[secret("", good)]).contains("1 to 64 bytes"));
        assert!(refused(&[secret("a\n", good)]).contains("\"a\\n\""));
        let many: Vec<_> = (0..17).map(|n| secret(&n.to_string(), good)).collect();
        assert!(refused(&many).contains("17 secrets of 476 bytes"));
        let large: Vec<_> = (0..5).map(|n| secret(&n.to_string(), &good.repeat(140))).collect();
        assert!(refused(&large).contains("5 secrets of 19600 bytes"));
    }

    #[test]
    fn children_are_made_without_what_is_known_alone() {
        let held = Secrets::of(vec![secret("a", b"correct horse battery staple")]);
        held.expect_known(Some("web")).unwrap();
        Secrets::Withheld.expect_known(Some("web")).unwrap();
        assert_eq!((held.names(), Secrets::Withheld.names()), (vec!["a".to_owned()], Vec::new()));
        for (secrets, vm, named) in
            [(Secrets::of(Vec::new()), Some("web"), "\"web\""), (Secrets::None, None, "a snapshot")]
        {
            let refused = secrets.expect_known(vm).unwrap_err().to_string();
            assert!(refused.contains(named), "{refused}");
        }
    }
}
