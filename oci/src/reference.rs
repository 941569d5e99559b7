//! References to images.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::digest::Digest;

/// The registry of names without one.
pub const REGISTRY_VARIABLE: &str = "CLADE_REGISTRY";
/// Docker Hub in the names of images, which is the host of none of its servers.
pub(crate) const DOCKER_HUB: &str = "docker.io";
/// The host of Docker Hub's index, the key of its credentials in docker's configuration.
const DOCKER_HUB_INDEX: &str = "index.docker.io";
/// The host of Docker Hub's registry.
pub(crate) const DOCKER_HUB_REGISTRY: &str = "registry-1.docker.io";

/// Whether a host of a name means Docker Hub.
pub(crate) fn is_docker_hub(host: &str) -> bool {
    [DOCKER_HUB, DOCKER_HUB_INDEX, DOCKER_HUB_REGISTRY].contains(&host)
}

/// A text that is not a reference to an image.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// The text is not a reference.
    #[error("{text:?} names no image: {why}")]
    Text {
        /// The text.
        text: String,
        /// The reason.
        why: &'static str,
    },
    /// The registry is missing.
    #[error("{0:?} names no registry: HOST[:PORT]/NAME, or set {REGISTRY_VARIABLE} to HOST[:PORT][/PREFIX]")]
    NoRegistry(String),
}

/// The manifest within a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Version {
    /// By a name, which may refer to another manifest later.
    Tag(String),
    /// By its digest.
    Digest(Digest),
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// A reference to an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// `oci:DIR[:TAG]`: an OCI layout.
    Layout {
        /// Its directory.
        dir: PathBuf,
        /// The tag, needed if there are several images.
        tag: Option<String>,
    },
    /// `docker-archive:FILE`: the output of `docker save`.
    Archive {
        /// Its path.
        file: PathBuf,
    },
    /// `HOST[:PORT]/NAME[:TAG|@DIGEST]`.
    Registry {
        /// The host, with the port if there is one.
        host: String,
        /// The repository.
        name: String,
        /// The image in the repository.
        version: Version,
    },
}

/// The name of an image in a store, if that names Docker Hub as this version does; else the name itself.
pub(crate) fn canonical_name(name: &str) -> String {
    let is_other = |host: &str| host != DOCKER_HUB && is_docker_hub(host);
    let is_other_hub = name.split_once('/').is_some_and(|(host, _)| is_other(host));
    let reference = is_other_hub.then(|| Reference::parse(name, None).ok()).flatten();
    reference.map_or_else(|| name.to_owned(), |reference| reference.to_string())
}

fn is_tag(tag: &str) -> bool {
    let mut bytes = tag.bytes();
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= 128
        && bytes.next().is_some_and(is_word)
        && bytes.all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'))
}

/// Whether the text is a path of repositories as in the distribution specification.
fn is_name(name: &str) -> bool {
    let is_part = |part: &str| {
        let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let ends = part.bytes().next().into_iter().chain(part.bytes().last());
        part.len() <= 255
            && !part.is_empty()
            && ends.into_iter().all(alphanumeric)
            && part.bytes().all(|byte| alphanumeric(byte) || matches!(byte, b'.' | b'_' | b'-'))
    };
    name.len() <= 255 && name.split('/').all(is_part)
}

fn is_host(host: &str) -> bool {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (host, None),
    };
    let inner = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let is_known = match inner {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'))
        }
    };
    is_known && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

impl Reference {
    /// Parses a reference. `registry` is that of names without one.
    ///
    /// # Errors
    /// When the text is not a reference.
    pub fn parse(text: &str, registry: Option<&str>) -> Result<Self, ReferenceError> {
        let bad = |why| ReferenceError::Text { text: text.to_owned(), why };
        if let Some(rest) = text.strip_prefix("oci:") {
            // The text after the last colon is a tag, unless it is a part of the path.
            let (dir, tag) = match rest.rsplit_once(':') {
                Some((dir, tag)) if !tag.contains('/') => (dir, Some(tag.to_owned())),
                _ => (rest, None),
            };
            if dir.is_empty() || tag.as_deref() == Some("") {
                return Err(bad("oci:DIR[:TAG]"));
            }
            return Ok(Self::Layout { dir: dir.into(), tag });
        }
        if let Some(file) = text.strip_prefix("docker-archive:") {
            return if file.is_empty() {
                Err(bad("docker-archive:FILE"))
            } else {
                Ok(Self::Archive { file: file.into() })
            };
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(|_| bad("its digest is none"))?)),
            None => (text, None),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(bad("a tag is letters, digits, and _.- after the first; a port needs a name behind it"));
        }
        let has_host = |first: &str| first.contains(['.', ':']) || first == "localhost";
        let (host, name) = match (path.split_once('/'), registry) {
            (Some((host, name)), _) if has_host(host) => (host, name.to_owned()),
            (_, Some(registry)) => match registry.split_once('/') {
                Some((host, prefix)) => (host, format!("{prefix}/{path}")),
                None => (registry, path.to_owned()),
            },
            (_, None) if is_name(path) => return Err(ReferenceError::NoRegistry(text.to_owned())),
            (_, None) => return Err(bad("a repository is lower-case letters, digits, and ._- within its parts")),
        };
        if !is_host(host) {
            return Err(bad("its registry is no HOST[:PORT]"));
        }
        if !is_name(&name) {
            return Err(bad("a repository is lower-case letters, digits, and ._- within its parts"));
        }
        let (host, name) = match is_docker_hub(host) {
            // Docker's own images have short names.
            true if !name.contains('/') => (DOCKER_HUB, format!("library/{name}")),
            true => (DOCKER_HUB, name),
            false => (host, name),
        };
        let latest = || Version::Tag(tag.unwrap_or("latest").to_owned());
        Ok(Self::Registry { host: host.to_owned(), name, version: digest.map_or_else(latest, Version::Digest) })
    }

    /// Whether its registry is on this machine.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let Self::Registry { host, .. } = self else { return false };
        let name = match host.rsplit_once(':') {
            Some((name, port)) if !port.contains(']') => name,
            _ => host,
        };
        let name = name.trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

/// The registry of names without one, if it is set.
fn default_registry() -> Option<String> {
    std::env::var(REGISTRY_VARIABLE).ok().filter(|registry| !registry.is_empty())
}

/// A name for an image of this store: `[HOST[:PORT]/]NAME[:TAG]`. Without a registry it is a name
/// of this store alone, of which nothing is pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageName(String);

impl ImageName {
    /// Parses a name. `registry` is that of names without one.
    ///
    /// # Errors
    /// When the text is not a name, or names an image of another kind.
    pub fn parse(text: &str, registry: Option<&str>) -> Result<Self, ReferenceError> {
        let why = "an image is built under a name: [HOST[:PORT]/]NAME[:TAG]";
        let bad = || ReferenceError::Text { text: text.to_owned(), why };
        // The host of a name without a registry is not shown.
        let (reference, is_local) = match Reference::parse(text, registry) {
            Err(ReferenceError::NoRegistry(_)) => (Reference::parse(text, Some("localhost"))?, true),
            reference => (reference?, false),
        };
        match reference {
            Reference::Registry { name, version: Version::Tag(tag), .. } if is_local => {
                Ok(Self(format!("{name}:{tag}")))
            }
            reference @ Reference::Registry { version: Version::Tag(_), .. } => Ok(Self(reference.to_string())),
            _ => Err(bad()),
        }
    }
}

impl FromStr for ImageName {
    type Err = ReferenceError;
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text, default_registry().as_deref())
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let registry = default_registry();
        // The name in a store must not depend on the working directory.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Ok(match Self::parse(text, registry.as_deref())? {
            Self::Layout { dir, tag } => Self::Layout { dir: absolute(dir), tag },
            Self::Archive { file } => Self::Archive { file: absolute(file) },
            other => other,
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout { dir, tag: None } => write!(f, "oci:{}", dir.display()),
            Self::Layout { dir, tag: Some(tag) } => write!(f, "oci:{}:{tag}", dir.display()),
            Self::Archive { file } => write!(f, "docker-archive:{}", file.display()),
            Self::Registry { host, name, version: Version::Tag(tag) } => write!(f, "{host}/{name}:{tag}"),
            Self::Registry { host, name, version: Version::Digest(digest) } => write!(f, "{host}/{name}@{digest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_in_three_ways() {
        let of = |text: &str| Reference::parse(text, None).unwrap();
        assert_eq!(of("oci:/a/b"), Reference::Layout { dir: "/a/b".into(), tag: None });
        assert_eq!(of("oci:a:b:3.1"), Reference::Layout { dir: "a:b".into(), tag: Some("3.1".into()) });
        assert_eq!(of("docker-archive:a:b"), Reference::Archive { file: "a:b".into() });
        let registry = |host: &str, name: &str, tag: &str| Reference::Registry {
            host: host.into(),
            name: name.into(),
            version: Version::Tag(tag.into()),
        };
        assert_eq!(of("localhost:5000/a/b_c"), registry("localhost:5000", "a/b_c", "latest"));
        assert_eq!(of("[::1]:5000/a:1"), registry("[::1]:5000", "a", "1"));
        let short = |text| Reference::parse(text, Some("127.0.0.1:5000/library")).unwrap();
        assert_eq!(short("python:3.12"), registry("127.0.0.1:5000", "library/python", "3.12"));
        let digest = Digest::of(b"");
        let named = of(&format!("example.org/a:tag@{digest}"));
        assert_eq!(named.to_string(), format!("example.org/a@{digest}"));
        for text in ["oci:/a", "oci:/a:t", "docker-archive:x", "localhost/a:latest"] {
            assert_eq!(of(text).to_string(), text);
        }
    }

    #[test]
    fn an_image_is_built_under_a_name_with_a_registry_or_without() {
        let of = |text: &str, registry| ImageName::parse(text, registry).map(|name| name.to_string());
        assert_eq!(of("app", None).unwrap(), "app:latest");
        assert_eq!(of("team/app:1", None).unwrap(), "team/app:1");
        assert_eq!(of("app:1", Some("example.org/a")).unwrap(), "example.org/a/app:1");
        assert_eq!(of("localhost:5000/app", None).unwrap(), "localhost:5000/app:latest");
        let digest = format!("app@{}", Digest::of(b""));
        for text in ["", "App", "app:", "oci:/a", "docker-archive:/a", "a//b", &digest] {
            assert!(matches!(of(text, None), Err(ReferenceError::Text { .. })), "{text}");
        }
    }

    #[test]
    fn docker_hubs_names_are_those_of_dockers_tools() {
        let of = |text: &str, registry| Reference::parse(text, registry).unwrap().to_string();
        for text in ["docker.io/python:3", "index.docker.io/library/python:3", "registry-1.docker.io/python:3"] {
            assert_eq!(of(text, None), "docker.io/library/python:3", "{text}");
        }
        assert_eq!(of("python", Some("docker.io")), "docker.io/library/python:latest");
        assert_eq!(of("docker.io/a/b", None), "docker.io/a/b:latest");
        assert_eq!(of("other.docker.io/python", None), "other.docker.io/python:latest");
    }

    #[test]
    fn this_machine_is_known() {
        let of = |text: &str| Reference::parse(text, None).unwrap().is_loopback();
        assert!(of("localhost/a") && of("127.0.0.1:5000/a") && of("[::1]:1/a"));
        assert!(!of("localhost.example.org/a") && !of("127.0.0.1.example.org/a") && !of("oci:localhost"));
    }

    #[test]
    fn what_names_no_image_is_refused() {
        let names = ["", "oci:", "oci:a:", "docker-archive:", "a.b/../c", "a.b/C", "a.b/c:", "a.b/c:x y"];
        let more = ["a.b/c@sha256:0", "a.b:x/c", "a b.c/d", "a.b/c//d", "a.b/c?x", "-/c", "a.b/.c", "a.b:99999/c"];
        for text in names.into_iter().chain(more) {
            let error = Reference::parse(text, None).unwrap_err();
            assert!(matches!(&error, ReferenceError::Text { text: named, .. } if named == text), "{text}: {error}");
        }
        assert_eq!(Reference::parse("python:3", None), Err(ReferenceError::NoRegistry("python:3".into())));
    }
}
