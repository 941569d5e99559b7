//! A name and a password for a registry, and their place in the configuration of docker's tools.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::reference::{DOCKER_HUB, is_docker_hub};

/// The directory of docker's configuration, if it is not `.docker` in the home directory.
pub const DOCKER_CONFIG_VARIABLE: &str = "DOCKER_CONFIG";
/// Maximum length of the file.
const MAX_FILE: u64 = 1 << 20;

/// A name and a password, absent from every error, log and debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    username: String,
    password: Zeroizing<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// Why there are no credentials. No variant contains any.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// A name that basic authentication cannot encode.
    #[error("a registry's user name is not empty, has no colon and no control characters")]
    Username,
    /// A password that basic authentication cannot encode.
    #[error("a registry's password is not empty, and has no control characters")]
    Password,
    /// The file cannot be read.
    #[error("{path} cannot be read")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not a configuration of docker's.
    #[error("{path} is not a valid docker configuration: line {line}, column {column}")]
    Config {
        /// The file.
        path: PathBuf,
        /// The line of the fault.
        line: usize,
        /// The column of the fault.
        column: usize,
    },
    /// The entry for a registry is not a name and a password.
    #[error("{path}: the entry of \"auths\" for {registry} is not base64 of NAME:PASSWORD")]
    Auth {
        /// The file.
        path: PathBuf,
        /// The registry.
        registry: String,
    },
}

/// The used part of docker's configuration. Credential helpers in it are not run.
#[derive(Default, Deserialize)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
}

#[derive(Default, Deserialize)]
struct Auth {
    auth: Option<Zeroizing<String>>,
    username: Option<String>,
    password: Option<Zeroizing<String>>,
    #[serde(default, rename = "identitytoken")]
    identity_token: Option<Zeroizing<String>>,
}

/// The registry of a key of "auths": `HOST[:PORT]`, possibly as an address with a path.
fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

/// Whether a key of "auths" is of the registry `host`.
fn is_key_of(key: &str, host: &str) -> bool {
    let key = host_of(key);
    key.eq_ignore_ascii_case(host) || host == DOCKER_HUB && is_docker_hub(&key.to_ascii_lowercase())
}

impl Credentials {
    /// A name and a password.
    ///
    /// # Errors
    /// When they cannot be sent.
    pub fn new(username: &str, password: Zeroizing<String>) -> Result<Self, CredentialsError> {
        let is_plain = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
        if !is_plain(username) || username.contains(':') {
            return Err(CredentialsError::Username);
        }
        if !is_plain(&password) {
            return Err(CredentialsError::Password);
        }
        Ok(Self { username: username.to_owned(), password })
    }

    /// The credentials for the registry `host` in docker's configuration, if any: in the directory
    /// of [`DOCKER_CONFIG_VARIABLE`], otherwise in `.docker` in the home directory.
    ///
    /// # Errors
    /// When the file exists and cannot be used.
    pub fn of_docker(host: &str) -> Result<Option<Self>, CredentialsError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = || variable("HOME").map(|home| home.join(".docker"));
        match variable(DOCKER_CONFIG_VARIABLE).or_else(home) {
            Some(dir) => Self::of_docker_in(&dir, host),
            None => Ok(None),
        }
    }

    /// The same for a given directory.
    ///
    /// # Errors
    /// When the file exists and cannot be used.
    pub fn of_docker_in(dir: &Path, host: &str) -> Result<Option<Self>, CredentialsError> {
        let path = dir.join("config.json");
        let mut bytes = Zeroizing::new(Vec::new());
        let read = File::open(&path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
        match read {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(source) => return Err(CredentialsError::File { path, source }),
            Ok(_) => {}
        }
        // The error itself is dropped, because it may contain a value.
        let wrong = |error: serde_json::Error| CredentialsError::Config {
            path: path.clone(),
            line: error.line(),
            column: error.column(),
        };
        let config: Config = serde_json::from_slice(&bytes).map_err(wrong)?;
        let Some((_, found)) = config.auths.into_iter().find(|(key, _)| is_key_of(key, host)) else {
            return Ok(None);
        };
        let broken = || CredentialsError::Auth { path: path.clone(), registry: host.to_owned() };
        match found {
            // Its `auth` has no password. The token is for an exchange by OAuth, which is not done here.
            Auth { identity_token: Some(token), .. } if !token.is_empty() => Ok(None),
            Auth { auth: Some(auth), .. } if !auth.is_empty() => {
                let bytes = BASE64_STANDARD.decode(auth.as_bytes()).map(Zeroizing::new).map_err(|_| broken())?;
                let text = std::str::from_utf8(&bytes).map_err(|_| broken())?;
                let (username, password) = text.split_once(':').ok_or_else(broken)?;
                let password = Zeroizing::new(password.trim_end_matches('\0').to_owned());
                Self::new(username, password).map(Some).map_err(|_| broken())
            }
            Auth { username: Some(username), password: Some(password), .. } => {
                Self::new(&username, password).map(Some).map_err(|_| broken())
            }
            // The credentials are in a credential helper, which is not run.
            _ => Ok(None),
        }
    }

    /// The value of the authorization header.
    pub(crate) fn header(&self) -> Zeroizing<String> {
        let both = Zeroizing::new(format!("{}:{}", self.username, &*self.password));
        Zeroizing::new(format!("Basic {}", &*Zeroizing::new(BASE64_STANDARD.encode(both.as_bytes()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(username: &str, password: &str) -> Result<Credentials, CredentialsError> {
        Credentials::new(username, Zeroizing::new(password.to_owned()))
    }

    #[test]
    fn a_name_and_a_password_are_sent_and_not_shown() {
        let both = new("Aladdin", "open sesame").unwrap();
        assert_eq!(&*both.header(), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(format!("{both:?}"), "Credentials(..)");
        for (username, password) in [("", "x"), ("a:b", "x"), ("a\r\nb", "x"), ("a", ""), ("a", "x\n")] {
            let error = new(username, password).unwrap_err().to_string();
            assert!(!error.contains("a:b") && !error.contains('x'), "{error}");
        }
    }

    #[test]
    fn docker_keeps_them_by_registry() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(dir.path().join("config.json"), text).unwrap();
        let find = |host: &str| Credentials::of_docker_in(dir.path(), host);
        assert_eq!(find("a.example").unwrap(), None, "no file");
        write(
            r#"{"auths": {"a.example": {"auth": "QWxhZGRpbjpvcGVuIHNlc2FtZQ=="}, "b.example:5000": {"username": "u", "password": "p:w"},
                "https://c.example/v1/": {"auth": "dTpwdw=="}, "d.example": {}, "e.example": {"auth": "dTp"},
                "f.example": {"auth": "bm9jb2xvbg=="}}, "credsStore": "desktop"}"#,
        );
        assert_eq!(find("a.example").unwrap(), Some(new("Aladdin", "open sesame").unwrap()));
        assert_eq!(find("B.example:5000").unwrap(), Some(new("u", "p:w").unwrap()));
        assert_eq!(find("c.example").unwrap(), Some(new("u", "pw").unwrap()));
        for none in ["d.example", "b.example", "a.example:443", "example", "v1"] {
            assert_eq!(find(none).unwrap(), None, "{none}");
        }
        // As `docker login` writes an identity token: without a password.
        write(
            r#"{"auths": {"t.example": {"auth": "dTo=", "identitytoken": "t"}, "e.example": {"auth": "dTp"},
                "f.example": {"auth": "bm9jb2xvbg=="}, "g.example": {"auth": "dTo="}}}"#,
        );
        assert_eq!(find("t.example").unwrap(), None);
        for broken in ["e.example", "f.example", "g.example"] {
            let error = find(broken).unwrap_err().to_string();
            assert!(error.contains(broken) && error.contains("config.json") && !error.contains("dTp"), "{error}");
        }
        write(r#"{"auths": {"a.example": {"auth": ["hidden"]}}}"#);
        let error = find("a.example").unwrap_err().to_string();
        assert!(error.contains("line 1") && !error.contains("hidden"), "{error}");
        write(r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dTpwdw=="}}}"#);
        assert_eq!(find("docker.io").unwrap(), Some(new("u", "pw").unwrap()));
        assert_eq!(find("a.docker.io").unwrap(), None);
        write(r#"{"credHelpers": {}}"#);
        assert_eq!(find("a.example").unwrap(), None);
    }
}
