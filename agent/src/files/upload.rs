//! Uploads: as a body, or as a form of several files. Only the piece being written is in memory.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clade_agent_proto::api::Written;
use flate2::write::MultiGzDecoder;
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE};
use hyper::http::request::Parts;

use super::writing::{WriteError, WrittenFile};
use super::{Refusal, Wanted, bad, failed, open_regular, refusal};
use crate::filesystem::metadata;
use crate::http::{BodyError, Reply, Shared, json, piece, text};
use crate::log::log;
use crate::multipart::{Multipart, PartEvent, boundary};
use crate::paths;
use crate::users::User;

/// Bytes written at a time.
const PIECE: usize = 256 << 10;
/// Bytes unpacked at a time: they may expand by a factor of a thousand.
const PACKED: usize = 512;
/// Maximum number of files in a form.
const MAX_FILES: usize = 10_000;

fn internal() -> Refusal {
    (StatusCode::INTERNAL_SERVER_ERROR, "the request has failed".to_owned())
}

fn broken(error: &BodyError) -> Refusal {
    let status = match error {
        BodyError::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
        BodyError::Late => StatusCode::REQUEST_TIMEOUT,
        BodyError::Broken(_) => StatusCode::BAD_REQUEST,
    };
    (status, error.to_string())
}

/// The bytes of a request's body, unpacked.
struct Body {
    incoming: Incoming,
    unpacker: Option<MultiGzDecoder<Vec<u8>>>,
    /// Received bytes that are not unpacked yet.
    packed: bytes::Bytes,
}

impl Body {
    fn new(incoming: Incoming, head: &Parts) -> Result<Self, Refusal> {
        let unpacker = match text(&head.headers, CONTENT_ENCODING.as_str()) {
            None | Some("" | "identity") => None,
            Some("gzip") => Some(MultiGzDecoder::new(Vec::new())),
            Some(other) => return Err(bad(format_args!("unsupported Content-Encoding: {other}, supported: [gzip]"))),
        };
        Ok(Self { incoming, unpacker, packed: bytes::Bytes::new() })
    }

    /// The next bytes; empty at the end.
    async fn next(&mut self) -> Result<Vec<u8>, Refusal> {
        let Some(unpacker) = &mut self.unpacker else {
            let next = piece(&mut self.incoming).await.map_err(|error| broken(&error))?;
            return Ok(next.map(Vec::from).unwrap_or_default());
        };
        let corrupt = |error: io::Error| bad(format_args!("error decompressing request body: {error}"));
        loop {
            while !self.packed.is_empty() {
                let some = self.packed.split_to(self.packed.len().min(PACKED));
                unpacker.write_all(&some).map_err(corrupt)?;
                if !unpacker.get_ref().is_empty() {
                    return Ok(std::mem::take(unpacker.get_mut()));
                }
            }
            match piece(&mut self.incoming).await.map_err(|error| broken(&error))? {
                Some(next) => self.packed = next,
                None => {
                    unpacker.try_finish().map_err(corrupt)?;
                    return Ok(std::mem::take(unpacker.get_mut()));
                }
            }
        }
    }
}

/// A file being written.
struct Writer {
    file: Arc<WrittenFile>,
    path: PathBuf,
    pending: Vec<u8>,
    is_whole: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // The client has disconnected or sent invalid data, or the VM is another: the log is the
        // only report.
        if !self.is_whole {
            log!("{} is written in part: its upload has ended too early", self.path.display());
        }
    }
}

fn not_written(what: &str, path: &Path, error: WriteError) -> Refusal {
    match error {
        WriteError::Superseded => {
            (StatusCode::CONFLICT, format!("another upload has begun to write {}", path.display()))
        }
        WriteError::File(error) => failed(what, path, &error),
    }
}

async fn elsewhere<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|_| internal())?
}

fn create(path: &Path, user: &User, mode: Option<u32>) -> Result<WrittenFile, Refusal> {
    if let Some(dir) = path.parent() {
        paths::make_dirs(dir, user).map_err(|error| failed("error ensuring directories", path, &error))?;
    }
    let found = std::fs::metadata(path);
    if found.as_ref().is_ok_and(std::fs::Metadata::is_dir) {
        return Err(bad(format_args!("path is a directory: {}", path.display())));
    }
    // Writing to a pipe or a device may block the thread for ever.
    if found.is_ok_and(|found| !found.is_file()) {
        return Err(bad(format_args!("path is no regular file: {}", path.display())));
    }
    let mut options = File::options();
    // Emptied below, when no earlier upload writes it any more.
    let opened = open_regular(options.write(true).create(true).truncate(false).mode(0o666), path);
    let file = opened.map_err(|error| failed("error opening file", path, &error))?;
    paths::fchown_to(&file, user).map_err(|error| failed("error changing file ownership", path, &error))?;
    if let Some(mode) = mode {
        let set = file.set_permissions(Permissions::from_mode(mode));
        set.map_err(|error| failed("error changing permissions", path, &error))?;
    }
    WrittenFile::begin(file).map_err(|error| failed("error emptying file", path, &error))
}

impl Writer {
    /// Creates the file, and sets its permissions before it has content.
    async fn create(path: PathBuf, wanted: &Wanted) -> Result<Self, Refusal> {
        let (opened, user, mode) = (path.clone(), wanted.user.clone(), wanted.mode);
        let file = elsewhere(move || create(&opened, &user, mode)).await?;
        Ok(Self { file: Arc::new(file), path, pending: Vec::new(), is_whole: false })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= PIECE { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Refusal> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (file, bytes) = (Arc::clone(&self.file), std::mem::take(&mut self.pending));
        let path = self.path.clone();
        let work = move || file.write_all(&bytes).map_err(|error| not_written("error writing file", &path, error));
        elsewhere(work).await
    }

    async fn finish(mut self, notes: &BTreeMap<String, String>) -> Result<Written, Refusal> {
        self.flush().await?;
        self.is_whole = true;
        let (file, notes, path) = (Arc::clone(&self.file), notes.clone(), self.path.clone());
        let written = Written {
            path: path.to_string_lossy().into_owned(),
            name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            kind: "file".into(),
            metadata: notes.clone(),
        };
        let work = move || {
            let noted = file.locked(|file| Ok(metadata::write(file, &notes)?));
            noted.map_err(|error| not_written("error writing metadata", &path, error))
        };
        elsewhere(work).await?;
        Ok(written)
    }
}

/// `POST /files`.
pub(crate) async fn upload(agent: &Shared, head: &Parts, body: Incoming) -> Reply {
    let written = async {
        let wanted = Wanted::of(agent, head, "write")?;
        let notes = metadata::of_headers(&head.headers).map_err(bad)?;
        let mut body = Body::new(body, head)?;
        let media_type = text(&head.headers, CONTENT_TYPE.as_str()).unwrap_or_default();
        let kind = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        if kind == "application/octet-stream" {
            return raw(&wanted, &notes, &mut body).await;
        }
        let boundary = boundary(media_type).ok_or_else(|| {
            let why = "expected multipart/form-data or application/octet-stream";
            bad(format_args!("unsupported content type: {media_type}, {why}"))
        })?;
        form(&wanted, &notes, &mut body, &boundary).await
    };
    written.await.map_or_else(refusal, |written| json(&written))
}

async fn raw(wanted: &Wanted, notes: &BTreeMap<String, String>, body: &mut Body) -> Result<Vec<Written>, Refusal> {
    let path = wanted.path.as_deref().filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| bad("path query parameter is required for raw body upload"))?;
    let mut writer = Writer::create(wanted.resolve(path)?, wanted).await?;
    loop {
        let bytes = body.next().await?;
        if bytes.is_empty() {
            return Ok(vec![writer.finish(notes).await?]);
        }
        writer.write(&bytes).await?;
    }
}

async fn form(
    wanted: &Wanted,
    notes: &BTreeMap<String, String>,
    body: &mut Body,
    boundary: &str,
) -> Result<Vec<Written>, Refusal> {
    let (mut reader, mut written) = (Multipart::new(boundary), Vec::new());
    let (mut writer, mut paths) = (None::<Writer>, HashSet::new());
    let form_error = |error| bad(format_args!("error reading form: {error}"));
    loop {
        let bytes = body.next().await?;
        if bytes.is_empty() {
            reader.finish().map_err(form_error)?;
            return Ok(written);
        }
        reader.push(&bytes);
        drop(bytes);
        while let Some(event) = reader.next_event().map_err(form_error)? {
            match event {
                PartEvent::Part { name, filename } if name.as_deref() == Some("file") => {
                    let path = wanted.path.clone().or(filename).ok_or_else(|| bad("a file without a name"))?;
                    let path = wanted.resolve(&path)?;
                    if !paths.insert(path.clone()) {
                        let why = "you cannot upload multiple files to the same path";
                        return Err(bad(format_args!("{why} '{}' in one upload request", path.display())));
                    }
                    if paths.len() > MAX_FILES {
                        return Err(bad(format_args!("more than {MAX_FILES} files in one form")));
                    }
                    writer = Some(Writer::create(path, wanted).await?);
                }
                PartEvent::Part { .. } => {}
                PartEvent::Data(bytes) => {
                    if let Some(writer) = &mut writer {
                        writer.write(&bytes).await?;
                    }
                }
                PartEvent::PartEnd => {
                    if let Some(writer) = writer.take() {
                        written.push(writer.finish(notes).await?);
                    }
                }
            }
        }
    }
}
