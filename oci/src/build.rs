//! An image made from another: one further layer, and another configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek};

use serde_json::{Map, Value, json};

use crate::digest::{Digest, DigestReader};
use crate::limits::ImageLimits;
use crate::manifest::{Descriptor, ImageManifest, LAYER, RunConfig, configuration_members};
use crate::options::PullOptions;
use crate::pull::{Progress, PullError};
use crate::reference::ImageName;
use crate::source::{ImageSource, SourceError};
use crate::store::{Image, ImageStore, ImageStoreError};

/// The end of an archive, which is all of an empty one.
const END: usize = 1024;
/// The text of the history's entry for the layer.
const LAYER_TEXT: &str = "the changes of all instructions";
/// That of a layer of a base image without a history.
const BASE_TEXT: &str = "a layer of the base image";

/// Differences of an image from the one it is made from.
#[derive(Debug)]
pub struct ImageChanges {
    /// The archive of its further layer, if there is one, which is not trusted.
    pub layer: Option<File>,
    /// Its program, variables, directory and user.
    pub config: RunConfig,
    /// Labels to add.
    pub labels: BTreeMap<String, String>,
    /// Ports to add.
    pub ports: BTreeSet<String>,
    /// The instructions that it was made by.
    pub instructions: Vec<String>,
    /// Its time, as in RFC 3339.
    pub created: String,
}

/// The content that is not in the store yet.
struct BuiltSource {
    manifest: (Descriptor, Vec<u8>),
    config: (Descriptor, Vec<u8>),
    layer: Option<(Descriptor, File)>,
}

impl ImageSource for BuiltSource {
    fn root(&mut self) -> Result<(Descriptor, Vec<u8>), SourceError> {
        Ok(self.manifest.clone())
    }

    fn manifest(&mut self, _: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        Ok(Box::new(&self.manifest.1[..]))
    }

    fn blob(&mut self, wanted: &Descriptor) -> Result<Box<dyn Read + '_>, SourceError> {
        match &mut self.layer {
            Some((layer, file)) if layer.digest == wanted.digest => {
                file.rewind().map_err(unreadable)?;
                Ok(Box::new(file))
            }
            _ if wanted.digest == self.config.0.digest => Ok(Box::new(&self.config.1[..])),
            // The base image was in the store when its manifest was read.
            _ => Err(SourceError::Missing("of the base image".into(), wanted.digest.to_string())),
        }
    }
}

fn unreadable(source: io::Error) -> SourceError {
    SourceError::File { path: "the new layer".into(), source }
}

/// The descriptor of an archive; none of an empty one.
fn describe(layer: &mut File) -> io::Result<Option<Descriptor>> {
    layer.rewind()?;
    let size = layer.metadata()?.len();
    let mut reader = DigestReader::new(&mut *layer, &Digest::of(b""));
    let mut first = Vec::new();
    (&mut reader).take(END as u64 + 1).read_to_end(&mut first)?;
    if first.len() <= END && first.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    io::copy(&mut reader, &mut io::sink())?;
    Ok(Some(Descriptor { digest: reader.digest(), size, ..Descriptor::of(LAYER, b"") }))
}

/// The object of that name, which takes the place of anything else.
fn object<'a>(of: &'a mut Map<String, Value>, name: &str) -> &'a mut Map<String, Value> {
    let value = of.entry(name).or_insert_with(|| json!({}));
    if !value.is_object() {
        *value = json!({});
    }
    match value {
        Value::Object(object) => object,
        // Made an object above.
        _ => unreachable!("not an object"),
    }
}

fn push(of: &mut Map<String, Value>, name: &str, value: Value) {
    match of.entry(name).or_insert_with(|| json!([])) {
        Value::Array(all) => all.push(value),
        other => *other = json!([value]),
    }
}

/// The configuration of the base image, changed. Unknown members stay.
fn configuration(mut root: Map<String, Value>, changes: &ImageChanges, layer: Option<&Descriptor>) -> Vec<u8> {
    let RunConfig { entrypoint, cmd, env, working_dir, user, stop_signal: _, shell: _, on_build: _ } = &changes.config;
    let config = object(&mut root, "config");
    for (name, value) in [
        ("Entrypoint", json!(entrypoint)),
        ("Cmd", json!(cmd)),
        ("Env", json!(env)),
        ("WorkingDir", json!(working_dir)),
        ("User", json!(user)),
    ] {
        config.insert(name.to_owned(), value);
    }
    for (name, value) in &changes.labels {
        object(config, "Labels").insert(name.clone(), json!(value));
    }
    for port in &changes.ports {
        object(config, "ExposedPorts").insert(port.clone(), json!({}));
    }
    let created = &changes.created;
    // The history has an entry for each layer, if there is one at all.
    if !root.get("history").is_some_and(Value::is_array) {
        let layers = object(&mut root, "rootfs").get("diff_ids").and_then(Value::as_array).map_or(0, Vec::len);
        root.insert("history".to_owned(), json!(vec![json!({"created_by": BASE_TEXT}); layers]));
    }
    for text in &changes.instructions {
        push(&mut root, "history", json!({"created": created, "created_by": text, "empty_layer": true}));
    }
    if let Some(layer) = layer {
        push(object(&mut root, "rootfs"), "diff_ids", json!(layer.digest));
        push(&mut root, "history", json!({"created": created, "created_by": LAYER_TEXT}));
    }
    root.insert("created".to_owned(), json!(created));
    Value::Object(root).to_string().into_bytes()
}

impl ImageStore {
    /// Makes an image from `base`, with its disk, and gives it a name. The layer is checked like
    /// that of a registry. An earlier image of the name stays in the store without it.
    ///
    /// # Errors
    /// When `base` is no longer in the store, when the layer is refused, or when the store fails.
    /// The name stays as it was then.
    pub fn build(
        &self,
        base: &Image,
        mut changes: ImageChanges,
        name: &ImageName,
        limits: ImageLimits,
        progress: &dyn Progress,
    ) -> Result<Image, PullError> {
        let lock = self.lock()?;
        // The manifest and the configuration come first.
        let [manifest, config, ..] = &base.blobs[..] else {
            return Err(self.without_content(base).into());
        };
        let mut manifest = ImageManifest::parse(&self.read_blob(manifest)?)?;
        let root = configuration_members(&self.read_blob(config)?)?;
        let layer = match changes.layer.take() {
            Some(mut file) => describe(&mut file).map_err(unreadable)?.map(|layer| (layer, file)),
            None => None,
        };
        let config = configuration(root, &changes, layer.as_ref().map(|(layer, _)| layer));
        manifest.layers.extend(layer.as_ref().map(|(layer, _)| layer.clone()));
        let manifest = ImageManifest::of(&config, manifest.layers);
        let config = (manifest.config.clone(), config);
        let mut source = BuiltSource { manifest: manifest.to_bytes(), config, layer };
        let options = PullOptions { limits, ..PullOptions::default() };
        let built = self.pull_from(&lock, &mut source, &name.to_string(), &options, progress);
        if built.is_err() {
            // No later build has the same content: its time is another.
            let own = [&source.manifest.0, &source.config.0].into_iter();
            let own: Vec<Descriptor> = own.chain(source.layer.as_ref().map(|(layer, _)| layer)).cloned().collect();
            // An error here is not the build's.
            drop(self.discard_blobs(&lock, &own));
        }
        built
    }

    fn without_content(&self, image: &Image) -> ImageStoreError {
        let path = self.disk(&image.digest);
        ImageStoreError::File { path, what: "built upon", source: io::ErrorKind::InvalidData.into() }
    }
}
