//! A registry, as the distribution specification has it, with tokens for who is nobody in particular.

use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Response, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{Source, SourceError};
use crate::digest::{Digest, DigestError};
use crate::limits::MAX_DOCUMENT;
use crate::manifest::{Descriptor, accepted};
use crate::reference::Version;

/// Most bytes of what gives a token.
const MAX_TOKEN: u64 = 256 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// For the head of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
const REDIRECTS: u32 = 5;

/// A repository of a registry.
pub(super) struct Registry {
    agent: Agent,
    /// Up to the repository.
    base: String,
    name: String,
    version: Version,
    is_plain: bool,
    token: Option<String>,
}

impl Registry {
    pub(super) fn new(host: &str, name: &str, version: &Version, is_plain: bool) -> Self {
        let scheme = if is_plain { "http" } else { "https" };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(provider)
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(REDIRECTS)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .user_agent(concat!("clade/", env!("CARGO_PKG_VERSION")))
            // A registry that is asked in the clear may send elsewhere so too; others may not.
            .https_only(!is_plain)
            .build();
        Self {
            agent: config.into(),
            base: format!("{scheme}://{host}/v2/{name}"),
            name: name.to_owned(),
            version: version.clone(),
            is_plain,
            token: None,
        }
    }

    fn get(&mut self, path: &str, accept: &str) -> Result<Response<Body>, SourceError> {
        let url = format!("{}/{path}", self.base);
        let mut answer = self.ask(&url, accept)?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            self.token = Some(self.fetch_token(&url, &answer)?);
            answer = self.ask(&url, accept)?;
        }
        match answer.status() {
            StatusCode::OK => Ok(answer),
            status => Err(SourceError::Status { url, status: status.as_u16() }),
        }
    }

    fn ask(&self, url: &str, accept: &str) -> Result<Response<Body>, SourceError> {
        let mut request = self.agent.get(url).header("accept", accept);
        if let Some(token) = &self.token {
            // It is not sent on where the registry redirects to.
            request = request.header("authorization", format!("Bearer {token}"));
        }
        request.call().map_err(|source| SourceError::Http { url: url.to_owned(), source: Box::new(source) })
    }

    fn fetch_token(&self, url: &str, answer: &Response<Body>) -> Result<String, SourceError> {
        let asked = answer.headers().get("www-authenticate").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let unknown = || SourceError::Challenge { url: url.to_owned(), asked: asked.chars().take(200).collect() };
        let challenge = Challenge::parse(asked).ok_or_else(unknown)?;
        // In the clear anybody could take the token, and what it opens.
        if !(challenge.realm.starts_with("https://") || self.is_plain && challenge.realm.starts_with("http://")) {
            return Err(unknown());
        }
        let scope = challenge.scope.unwrap_or_else(|| format!("repository:{}:pull", self.name));
        let mut request = self.agent.get(&challenge.realm).query("scope", scope);
        if let Some(service) = challenge.service {
            request = request.query("service", service);
        }
        let realm = challenge.realm;
        let answer = request.call();
        let answer = answer.map_err(|source| SourceError::Http { url: realm.clone(), source: Box::new(source) })?;
        if answer.status() != StatusCode::OK {
            return Err(SourceError::Status { url: realm, status: answer.status().as_u16() });
        }
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let bytes = read(&realm, answer, MAX_TOKEN)?;
        let token: Option<Token> = serde_json::from_slice(&bytes).ok();
        let token = token.and_then(|token| token.token.or(token.access_token)).filter(|token| !token.is_empty());
        token.ok_or(SourceError::NoToken(realm))
    }
}

/// Reads an answer, and one byte more than it may have.
fn read(url: &str, answer: Response<Body>, limit: u64) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    let read = answer.into_body().into_reader().take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|source| SourceError::Answer { url: url.to_owned(), source })?;
    Ok(bytes)
}

/// What a registry asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Challenge {
    realm: String,
    service: Option<String>,
    scope: Option<String>,
}

impl Challenge {
    /// Reads `Bearer realm="..",service="..",scope=".."`.
    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut challenge = Self::default();
        while !rest.is_empty() {
            let (key, after) = rest.trim_start_matches([' ', ',']).split_once('=')?;
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            match key.trim().to_ascii_lowercase().as_str() {
                "realm" => value.clone_into(&mut challenge.realm),
                "service" => challenge.service = Some(value.to_owned()),
                "scope" => challenge.scope = Some(value.to_owned()),
                _ => {}
            }
            rest = after.trim_start_matches([' ', ',']);
        }
        (!challenge.realm.is_empty()).then_some(challenge)
    }
}

impl Source for Registry {
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError> {
        let path = format!("manifests/{}", self.version);
        let answer = self.get(&path, &accepted())?;
        let kind = answer.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_owned();
        let bytes = read(&format!("{}/{path}", self.base), answer, MAX_DOCUMENT)?;
        let mut found = Descriptor::of(&kind, &bytes);
        if let Version::Digest(wanted) = &self.version {
            let is_it = Digest::of_kind(wanted, &bytes);
            if is_it != *wanted {
                return Err(DigestError::Content { wanted: wanted.clone(), found: is_it }.into());
            }
            found.digest = is_it;
        }
        Ok((found, bytes))
    }

    fn manifest(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        let answer = self.get(&format!("manifests/{}", wanted.digest), &accepted())?;
        Ok(Box::new(answer.into_body().into_reader()))
    }

    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        let answer = self.get(&format!("blobs/{}", wanted.digest), "*/*")?;
        Ok(Box::new(answer.into_body().into_reader()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let full = r#"Bearer realm="https://a/t?x=1",service="b c", scope="repository:x/y:pull,push""#;
        let parsed = Challenge::parse(full).unwrap();
        assert_eq!((parsed.realm.as_str(), parsed.service.as_deref()), ("https://a/t?x=1", Some("b c")));
        assert_eq!(parsed.scope.as_deref(), Some("repository:x/y:pull,push"));
        assert_eq!(Challenge::parse("bearer realm=x,error=y").unwrap().realm, "x");
        for wrong in ["", "Basic realm=\"x\"", "Bearer", "Bearer x", "Bearer realm=\"", "Bearer service=\"x\""] {
            assert_eq!(Challenge::parse(wrong), None, "{wrong}");
        }
    }
}
