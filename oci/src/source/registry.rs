//! A registry, as in the distribution specification, with tokens, and optional credentials.
//!
//! A name and a password are sent when the registry itself has asked for them: to the registry, or
//! to its token server over TLS. The connection is by TLS, or to this machine. After a redirect,
//! neither credentials nor a token are sent, and a challenge of the new host is not answered.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderValue, Response, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body, ResponseExt};

use super::stall::Stalling;
use super::{ImageSource, SourceError};
use crate::credentials::Credentials;
use crate::digest::{Digest, DigestError};
use crate::limits::MAX_DOCUMENT;
use crate::manifest::{Descriptor, accepted};
use crate::options::PullOptions;
use crate::reference::{DOCKER_HUB, DOCKER_HUB_REGISTRY, Version};

/// Maximum length of a token server's answer.
const MAX_TOKEN: u64 = 256 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the head of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout for a part of a body.
const STALL: Duration = Duration::from_secs(60);
/// Timeout for a whole body at any speed, because a thread waits for it.
const BODY_TIMEOUT: Duration = Duration::from_secs(12 * 3600);
const REDIRECTS: u32 = 5;

/// A repository of a registry.
pub(super) struct Registry {
    agent: Agent,
    host: String,
    /// The address up to the repository.
    base: String,
    name: String,
    version: Version,
    is_plain: bool,
    /// Whether the registry is on this machine.
    is_loopback: bool,
    credentials: Option<Credentials>,
    proof: Proof,
    stall: Duration,
}

/// The authentication of a request.
enum Proof {
    Nothing,
    Token(String),
    /// The name and the password.
    Password,
}

/// The certificates of a file. A registry's must be one of these or be signed by one.
fn roots(ca: &Path) -> Result<RootCerts, SourceError> {
    let pem = fs::read(ca).map_err(|source| SourceError::File { path: ca.to_owned(), source })?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(SourceError::NoCertificate(ca.to_owned()));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

impl Registry {
    pub(super) fn new(
        (host, is_loopback): (&str, bool),
        name: &str,
        version: &Version,
        options: &PullOptions,
    ) -> Result<Self, SourceError> {
        let is_plain = options.ca.is_none() && (options.is_insecure || is_loopback);
        let roots = options.ca.as_deref().map_or(Ok(RootCerts::PlatformVerifier), roots)?;
        let server = if host == DOCKER_HUB { DOCKER_HUB_REGISTRY } else { host };
        let scheme = if is_plain { "http" } else { "https" };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder().unversioned_rustls_crypto_provider(provider).root_certs(roots).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(REDIRECTS)
            .redirect_auth_headers(RedirectAuthHeaders::Never)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .user_agent(concat!("clade/", env!("CARGO_PKG_VERSION")))
            // Only a registry used without TLS may redirect to another without TLS.
            .https_only(!is_plain)
            .build();
        Ok(Self {
            agent: config.into(),
            host: host.to_owned(),
            base: format!("{scheme}://{server}/v2/{name}"),
            name: name.to_owned(),
            version: version.clone(),
            is_plain,
            is_loopback,
            credentials: options.credentials.clone(),
            proof: Proof::Nothing,
            stall: options.stall.unwrap_or(STALL),
        })
    }

    fn get(&mut self, path: &str, accept: &str) -> Result<Response<Body>, SourceError> {
        let url = format!("{}/{path}", self.base);
        let mut answer = self.ask(&url, accept)?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            self.proof = self.prove(&url, &answer)?;
            answer = self.ask(&url, accept)?;
        }
        match answer.status() {
            StatusCode::OK => Ok(answer),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.is_own(&answer) => Err(self.denied()),
            status => Err(SourceError::Status { url, status: status.as_u16() }),
        }
    }

    fn ask(&self, url: &str, accept: &str) -> Result<Response<Body>, SourceError> {
        let mut request = self.agent.get(url).header("accept", accept);
        // Not passed on to the target of a redirect.
        match (&self.proof, &self.credentials) {
            (Proof::Token(token), _) => request = request.header("authorization", format!("Bearer {token}")),
            (Proof::Password, Some(credentials)) => request = request.header("authorization", sensitive(credentials)),
            (Proof::Password, None) | (Proof::Nothing, _) => {}
        }
        request.call().map_err(|source| SourceError::Http { url: url.to_owned(), source: Box::new(source) })
    }

    /// Whether an answer comes from the registry, not from the target of a redirect.
    fn is_own(&self, answer: &Response<Body>) -> bool {
        let base: Option<Uri> = self.base.parse().ok();
        base.is_some_and(|base| base.authority() == answer.get_uri().authority())
    }

    fn denied(&self) -> SourceError {
        let registry = self.host.clone();
        if self.credentials.is_some() { SourceError::Refused { registry } } else { SourceError::Anonymous { registry } }
    }

    /// The credentials, if they may be sent to `to`.
    fn credentials_for(&self, to: &str) -> Result<Option<&Credentials>, SourceError> {
        let Some(credentials) = &self.credentials else { return Ok(None) };
        let parsed: Option<Uri> = to.parse().ok();
        let is_tls = parsed.as_ref().is_some_and(|to| to.scheme_str() == Some("https"));
        let base: Option<Uri> = self.base.parse().ok();
        let is_host = parsed.as_ref().and_then(Uri::host) == base.as_ref().and_then(Uri::host);
        // An answer without TLS may be forged: the credentials do not go to a server named in it.
        let is_named = !self.is_plain || self.is_loopback || is_host;
        if is_tls && is_named || self.is_loopback && is_host {
            return Ok(Some(credentials));
        }
        Err(SourceError::Clear { registry: self.host.clone(), to: to.to_owned() })
    }

    /// Answers the registry's challenge.
    fn prove(&self, url: &str, answer: &Response<Body>) -> Result<Proof, SourceError> {
        let asked = answer.headers().get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok());
        let asked: Vec<&str> = asked.collect();
        let unknown =
            || SourceError::Challenge { url: url.to_owned(), asked: asked.join(", ").chars().take(200).collect() };
        if !self.is_own(answer) {
            return Err(unknown());
        }
        if let Some(challenge) = asked.iter().find_map(|text| Challenge::parse(text)) {
            return self.fetch_token(challenge, unknown).map(Proof::Token);
        }
        let is_basic = |text: &&str| text.split(' ').next().is_some_and(|scheme| scheme.eq_ignore_ascii_case("basic"));
        if !asked.iter().any(is_basic) {
            return Err(unknown());
        }
        match (&self.proof, self.credentials_for(url)?) {
            // The credentials were already sent.
            (Proof::Password, _) | (_, None) => Err(self.denied()),
            (_, Some(_)) => Ok(Proof::Password),
        }
    }

    fn fetch_token(&self, challenge: Challenge, unknown: impl Fn() -> SourceError) -> Result<String, SourceError> {
        // Without TLS the token could be stolen, and with it access to the repository.
        if !(challenge.realm.starts_with("https://") || self.is_plain && challenge.realm.starts_with("http://")) {
            return Err(unknown());
        }
        let scope = challenge.scope.unwrap_or_else(|| format!("repository:{}:pull", self.name));
        let mut request = self.agent.get(&challenge.realm).query("scope", scope);
        if let Some(service) = challenge.service {
            request = request.query("service", service);
        }
        let realm = challenge.realm;
        if let Some(credentials) = self.credentials_for(&realm)? {
            request = request.header("authorization", sensitive(credentials));
        }
        let answer = request.call();
        let answer = answer.map_err(|source| SourceError::Http { url: realm.clone(), source: Box::new(source) })?;
        if matches!(answer.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            return Err(self.denied());
        }
        if answer.status() != StatusCode::OK {
            return Err(SourceError::Status { url: realm, status: answer.status().as_u16() });
        }
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let bytes = read(&realm, answer, MAX_TOKEN, self.stall)?;
        let token: Option<Token> = serde_json::from_slice(&bytes).ok();
        let token = token.and_then(|token| token.token.or(token.access_token)).filter(|token| !token.is_empty());
        token.ok_or(SourceError::NoToken(realm))
    }
}

/// The value of a request's header, hidden from logs.
fn sensitive(credentials: &Credentials) -> HeaderValue {
    // Base64 is always a valid value.
    let mut value = HeaderValue::from_str(&credentials.header()).unwrap_or_else(|_| HeaderValue::from_static(""));
    value.set_sensitive(true);
    value
}

/// The body of an answer, with a timeout for stalls.
fn body(url: &str, answer: Response<Body>, stall: Duration) -> Result<Stalling, SourceError> {
    let body = Stalling::new(answer.into_body().into_reader(), stall);
    body.map_err(|source| SourceError::Answer { url: url.to_owned(), source })
}

/// Reads an answer, up to one byte more than the limit.
fn read(url: &str, answer: Response<Body>, limit: u64, stall: Duration) -> Result<Vec<u8>, SourceError> {
    let mut bytes = Vec::new();
    let body = body(url, answer, stall)?;
    let read = body.take(limit + 1).read_to_end(&mut bytes);
    read.map_err(|source| SourceError::Answer { url: url.to_owned(), source })?;
    Ok(bytes)
}

/// A registry's challenge.
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

impl ImageSource for Registry {
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError> {
        let path = format!("manifests/{}", self.version);
        let answer = self.get(&path, &accepted())?;
        let kind = answer.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim().to_owned();
        let bytes = read(&format!("{}/{path}", self.base), answer, MAX_DOCUMENT, self.stall)?;
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
        let path = format!("manifests/{}", wanted.digest);
        let answer = self.get(&path, &accepted())?;
        Ok(Box::new(body(&format!("{}/{path}", self.base), answer, self.stall)?))
    }

    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        let path = format!("blobs/{}", wanted.digest);
        let answer = self.get(&path, "*/*")?;
        Ok(Box::new(body(&format!("{}/{path}", self.base), answer, self.stall)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_is_asked_at_its_host_and_docker_hub_at_its_registrys() {
        let base = |text: &str| {
            let reference = crate::Reference::parse(text, None).unwrap();
            let crate::Reference::Registry { host, name, version } = &reference else { panic!("{reference:?}") };
            let is_loopback = reference.is_loopback();
            Registry::new((host, is_loopback), name, version, &PullOptions::default()).unwrap().base
        };
        assert_eq!(base("a.example:5000/b/c:1"), "https://a.example:5000/v2/b/c");
        assert_eq!(base("localhost:5000/b"), "http://localhost:5000/v2/b");
        for hub in ["docker.io/python:3.12", "docker.io/library/python", "index.docker.io/python"] {
            assert_eq!(base(hub), "https://registry-1.docker.io/v2/library/python", "{hub}");
        }
        assert_eq!(base("docker.io/a/b"), "https://registry-1.docker.io/v2/a/b");
    }

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

    #[test]
    fn an_answer_in_the_clear_names_no_server_for_a_password() {
        let registry = |host: &str, is_loopback: bool, is_insecure: bool| {
            let credentials = Credentials::new("ann", "secret".to_owned().into()).ok();
            let options = PullOptions { is_insecure, credentials, ..PullOptions::default() };
            Registry::new((host, is_loopback), "a/b", &Version::Tag("v1".to_owned()), &options).unwrap()
        };
        let (far, near) = ("registry.test:5000", "127.0.0.1:5000");
        for (host, is_loopback, is_insecure, to, is_sent) in [
            (far, false, false, "https://registry.test:5000/v2/a", true),
            (far, false, false, "https://tokens.test/token", true),
            (far, false, false, "http://registry.test:5000/v2/a", false),
            (far, false, true, "https://tokens.test/token", false),
            (far, false, true, "https://registry.test.evil/token", false),
            (far, false, true, "https://registry.test/token", true),
            (far, false, true, "http://registry.test:5000/v2/a", false),
            (near, true, false, "http://127.0.0.1:7000/token", true),
            (near, true, true, "https://tokens.test/token", true),
            (near, true, false, "http://tokens.test/token", false),
        ] {
            let registry = registry(host, is_loopback, is_insecure);
            let sent = registry.credentials_for(to);
            assert_eq!(sent.is_ok(), is_sent, "{host} {is_insecure} {to}: {:?}", sent.err());
        }
    }
}
