//! Manifests, indexes and configurations, of OCI and Docker.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::Digest;
use crate::limits::{ImageLimits, LimitError, MAX_DOCUMENT};

/// Maximum depth of nested indexes.
pub(crate) const MAX_NESTING: usize = 4;
const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// The media type of an uncompressed layer, which those of the others begin with.
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// The media types that a registry may send.
pub(crate) fn accepted() -> String {
    [&INDEXES[..], &MANIFESTS[..]].concat().join(", ")
}

/// Why no image can be made of a document.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The document is invalid JSON, or has another form.
    #[error("{what} cannot be understood")]
    Json {
        /// The document.
        what: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The document is too long.
    #[error("{what} has {found} bytes; {MAX_DOCUMENT} are allowed")]
    TooLong {
        /// The document.
        what: String,
        /// Its length.
        found: u64,
    },
    /// The document's type is not part of an image.
    #[error("{what} is of the type {found:?}, which is not supported")]
    MediaType {
        /// The document.
        what: String,
        /// Its media type.
        found: String,
    },
    /// An index without an image for this platform.
    #[error("there is no image for linux/amd64 among {0}")]
    Platform(String),
    /// An image for another platform.
    #[error("the image is for {0}, not for linux/amd64")]
    OtherPlatform(String),
    /// The nesting of indexes is too deep.
    #[error("the index {0} is more than {MAX_NESTING} indexes deep")]
    Nesting(Digest),
    /// The configuration lists other layers.
    #[error("the manifest has {manifest} layers, and its configuration {config}")]
    Layers {
        /// Layers in the manifest.
        manifest: usize,
        /// Layers in the configuration.
        config: usize,
    },
    /// A limit is exceeded.
    #[error(transparent)]
    Limit(#[from] LimitError),
}

/// A reference to content, with its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Its media type.
    #[serde(default)]
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Further annotations, such as a tag.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    pub(crate) fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            platform: None,
            annotations: BTreeMap::new(),
        }
    }
}

/// The platform of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Platform {
    /// Such as amd64.
    pub architecture: String,
    /// Such as linux.
    pub os: String,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
    fn shown(&self) -> String {
        // Both are the registry's.
        format!("{}/{}", self.os.escape_debug(), self.architecture.escape_debug())
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ImageIndex {
    manifests: Vec<Descriptor>,
}

/// An image: a configuration and layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageManifest {
    schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    media_type: Option<String>,
    /// Its configuration: the program, and the digests of its unpacked layers.
    pub config: Descriptor,
    /// The layers, from the lowest to the highest.
    pub layers: Vec<Descriptor>,
}

/// The compression of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    None,
    Gzip,
    Zstd,
}

/// The compression of the layer in a descriptor.
pub(crate) fn packing(layer: &Descriptor) -> Result<Packing, ManifestError> {
    let known = |prefix: &str| layer.media_type.strip_prefix(prefix);
    let rest = known(LAYER)
        .or_else(|| known("application/vnd.oci.image.layer.nondistributable.v1.tar"))
        .or_else(|| known("application/vnd.docker.image.rootfs.diff.tar"))
        .or_else(|| known("application/vnd.docker.image.rootfs.foreign.diff.tar"));
    match rest {
        Some("") => Ok(Packing::None),
        Some("+gzip" | ".gzip") => Ok(Packing::Gzip),
        Some("+zstd" | ".zstd") => Ok(Packing::Zstd),
        _ => Err(ManifestError::MediaType {
            what: format!("the layer {}", layer.digest),
            found: layer.media_type.clone(),
        }),
    }
}

/// A document that refers to content.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Box<ImageManifest>),
}

fn parse<'a, T: Deserialize<'a>>(what: impl FnOnce() -> String, bytes: &'a [u8]) -> Result<T, ManifestError> {
    let found = bytes.len() as u64;
    if found > MAX_DOCUMENT {
        return Err(ManifestError::TooLong { what: what(), found });
    }
    serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what: what(), source })
}

/// Parses an index or a manifest, by its own media type; `told` is the type in its descriptor.
pub(crate) fn document(told: &str, bytes: &[u8]) -> Result<Document, ManifestError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Any {
        media_type: Option<String>,
        #[serde(default)]
        manifests: Option<serde::de::IgnoredAny>,
        #[serde(default)]
        layers: Option<serde::de::IgnoredAny>,
    }
    let what = || "the manifest".to_owned();
    let any: Any = parse(what, bytes)?;
    let kind = any.media_type.as_deref().unwrap_or(told);
    let other = || ManifestError::MediaType { what: what(), found: kind.to_owned() };
    // Readers differ on the meaning of a document that is both.
    let is_index = match (any.manifests.is_some(), any.layers.is_some()) {
        (true, false) => true,
        (false, true) => false,
        _ => return Err(other()),
    };
    let fits = |kinds: [&str; 2]| kind.is_empty() || kinds.contains(&kind);
    match is_index {
        true if fits(INDEXES) => Ok(Document::Index(parse::<ImageIndex>(|| "the index".to_owned(), bytes)?.manifests)),
        false if fits(MANIFESTS) => Ok(Document::Manifest(Box::new(parse(what, bytes)?))),
        _ => Err(other()),
    }
}

/// The descriptor in an index for this platform.
pub(crate) fn choose(mut manifests: Vec<Descriptor>) -> Result<Descriptor, ManifestError> {
    let known = |one: &Descriptor| [&INDEXES[..], &MANIFESTS[..]].concat().contains(&one.media_type.as_str());
    let ours = |one: &Descriptor| one.platform.as_ref().is_some_and(Platform::is_ours);
    let chosen = manifests.iter().position(|one| known(one) && ours(one));
    // A descriptor without a platform may be for any.
    let chosen = chosen.or_else(|| manifests.iter().position(|one| known(one) && one.platform.is_none()));
    match chosen {
        Some(at) => Ok(manifests.swap_remove(at)),
        None => {
            let mut others: Vec<_> = manifests.iter().take(20).filter_map(|one| one.platform.as_ref()).collect();
            others.dedup();
            let others: Vec<_> = others.into_iter().map(Platform::shown).collect();
            let others = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
            Err(ManifestError::Platform(others.chars().take(400).collect()))
        }
    }
}

/// The program of an image, with its defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct RunConfig {
    /// The program and its first arguments.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// Replaceable arguments, including the program if there is no entrypoint.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Variables, as NAME=VALUE.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// The directory.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// A name or number, and optionally a group after a colon.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// The signal that ends the program in order, by name or number. Empty for SIGTERM.
    #[serde(deserialize_with = "or_default")]
    pub stop_signal: String,
    /// The program that runs texts of `RUN`, `CMD` and `ENTRYPOINT` in builds on top of the image; `/bin/sh -c` if
    /// empty.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub shell: Vec<String>,
    /// Instructions for builds on top of the image.
    #[serde(deserialize_with = "or_default", skip_serializing_if = "Vec::is_empty")]
    pub on_build: Vec<String>,
}

/// Docker writes null for empty values.
fn or_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(from).map(Option::unwrap_or_default)
}

/// The configuration of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageConfig {
    pub(crate) run: RunConfig,
    /// Digests of unpacked layers.
    pub(crate) diff_ids: Vec<Digest>,
}

impl ImageConfig {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Root {
            diff_ids: Vec<Digest>,
        }
        #[derive(Deserialize)]
        struct Config {
            #[serde(flatten)]
            platform: Platform,
            #[serde(default, deserialize_with = "or_default")]
            config: RunConfig,
            rootfs: Root,
        }
        let config: Config = parse(|| "the configuration".to_owned(), bytes)?;
        if !config.platform.is_ours() {
            return Err(ManifestError::OtherPlatform(config.platform.shown().chars().take(200).collect()));
        }
        Ok(Self { run: config.config, diff_ids: config.rootfs.diff_ids })
    }
}

/// All members of a configuration, also unknown ones.
pub(crate) fn configuration_members(bytes: &[u8]) -> Result<serde_json::Map<String, serde_json::Value>, ManifestError> {
    parse(|| "the configuration".to_owned(), bytes)
}

impl ImageManifest {
    /// The manifest in a store.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        parse(|| "the manifest".to_owned(), bytes)
    }

    /// A manifest for layers with an available configuration, as in an archive of Docker's.
    pub(crate) fn of(config: &[u8], layers: Vec<Descriptor>) -> Self {
        let config = Descriptor::of(CONFIGS[0], config);
        Self { schema_version: 2, media_type: Some(MANIFESTS[0].to_owned()), config, layers }
    }

    /// Its bytes, and their descriptor.
    pub(crate) fn to_bytes(&self) -> (Descriptor, Vec<u8>) {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        (Descriptor::of(MANIFESTS[0], &bytes), bytes)
    }

    /// Its descriptor, with its own media type.
    pub(crate) fn describe(&self, digest: Digest, size: u64) -> Descriptor {
        let media_type = self.media_type.as_deref().unwrap_or(MANIFESTS[0]);
        Descriptor { digest, size, ..Descriptor::of(media_type, b"") }
    }

    /// Checks the manifest before any of its content is fetched.
    pub(crate) fn check(&self, limits: &ImageLimits) -> Result<(), ManifestError> {
        if self.layers.len() > limits.layers {
            return Err(LimitError::Layers { found: self.layers.len(), limit: limits.layers }.into());
        }
        let what = || format!("the configuration {}", self.config.digest);
        if !CONFIGS.contains(&self.config.media_type.as_str()) {
            return Err(ManifestError::MediaType { what: what(), found: self.config.media_type.clone() });
        }
        if self.config.size > MAX_DOCUMENT {
            return Err(ManifestError::TooLong { what: what(), found: self.config.size });
        }
        let sum = self.layers.iter().try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
        if sum.is_none_or(|sum| sum > limits.bytes) {
            return Err(LimitError::Bytes(limits.bytes).into());
        }
        self.layers.iter().try_for_each(|layer| packing(layer).map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registrys_platform_is_shown_without_control_characters() {
        let platform = Platform { architecture: "\u{7}amd64".to_owned(), os: "\u{1b}]52;c;aGk=".to_owned() };
        assert_eq!(platform.shown(), r"\u{1b}]52;c;aGk=/\u{7}amd64");
    }
}
