//! Authorization of requests: the access token, and signatures of files.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use clade_agent_proto::TOKEN_HEADER;
use hyper::header::HeaderMap;
use sha2::{Digest, Sha256};

use crate::clock;
use crate::http::text;
use crate::settings::Token;

/// Whether a request has the token, if one is set.
pub(crate) fn has_token(token: Option<&Token>, headers: &HeaderMap) -> bool {
    token.is_none_or(|token| headers.get(TOKEN_HEADER).is_some_and(|given| token.is(given.as_bytes())))
}

/// The signed parts of a request for a file.
#[derive(Debug)]
pub(crate) struct Signed<'a> {
    pub(crate) path: &'a str,
    pub(crate) operation: &'static str,
    pub(crate) user: &'a str,
    pub(crate) signature: Option<&'a str>,
    pub(crate) expires: Option<&'a str>,
}

impl Signed<'_> {
    /// Whether access to the file is allowed: by the token, or by a signature made with it.
    pub(crate) fn check(&self, token: Option<&Token>, headers: &HeaderMap) -> Result<(), &'static str> {
        let Some(token) = token else { return Ok(()) };
        if text(headers, TOKEN_HEADER).is_some_and(|given| !given.is_empty()) {
            let wrong = "access token present in header but does not match";
            return if has_token(Some(token), headers) { Ok(()) } else { Err(wrong) };
        }
        let signature = self.signature.ok_or("missing signature query parameter")?;
        let mut signed = format!("{}:{}:{}:{}", self.path, self.operation, self.user, token.reveal());
        let expires = self.expires.map(|time| time.parse::<i64>().map_err(|_| "invalid signature")).transpose()?;
        if let Some(expires) = expires {
            // Writing to a String does not fail.
            let _ = write!(signed, ":{expires}");
        }
        let wanted = format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(signed)));
        if !Token::of(Some(wanted)).is_some_and(|wanted| wanted.is(signature.as_bytes())) {
            return Err("invalid signature");
        }
        let now = i64::try_from(clock::now_ns() / clock::SECOND_NS).unwrap_or(i64::MAX);
        if expires.is_some_and(|expires| expires < now) {
            return Err("signature is already expired");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_for_one_file_one_user_and_one_operation() {
        let token = Token::of(Some("secret".into()));
        // sha256("/a:read:ann:secret"), made with sha256sum.
        let good = "v1_Ld7P8LITTkJoLa8ovO+bKAJTEWiZtKB1obtS/Zd0di4";
        let of = |path, operation, user, signature| Signed { path, operation, user, signature, expires: None };
        let none = HeaderMap::new();
        let check = |signed: Signed<'_>| signed.check(token.as_ref(), &none);
        check(of("/a", "read", "ann", Some(good))).unwrap();
        check(of("/b", "read", "ann", Some(good))).unwrap_err();
        check(of("/a", "write", "ann", Some(good))).unwrap_err();
        check(of("/a", "read", "", Some(good))).unwrap_err();
        check(of("/a", "read", "ann", None)).unwrap_err();
        of("/a", "read", "ann", None).check(None, &none).unwrap();
        let with =
            |value: &str| [(TOKEN_HEADER.parse().unwrap(), value.parse().unwrap())].into_iter().collect::<HeaderMap>();
        of("/a", "read", "ann", None).check(token.as_ref(), &with("secret")).unwrap();
        of("/a", "read", "ann", Some(good)).check(token.as_ref(), &with("secre7")).unwrap_err();
    }
}
