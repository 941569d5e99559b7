//! Files of the guest.

use std::sync::Arc;

use bytes::Bytes;
use clade_agent_proto::api::Written;
use clade_agent_proto::filesystem::{
    EntryInfo, EntryResponse, ListDirRequest, ListDirResponse, MakeDirRequest, PathRequest,
};
use clade_agent_proto::process::Empty;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE};
use tokio::sync::mpsc;

use crate::connection::{Answer, Outgoing};
use crate::rpc::refusal;
use crate::{Client, ClientError};

/// Maximum size of a list: the agent sends 65,536 entries at most, of a few hundred bytes.
const MAX_LIST: usize = 64 << 20;

/// A file being downloaded.
#[derive(Debug)]
pub struct Download {
    answer: Answer,
    /// Its length, if the agent sends it.
    pub length: Option<u64>,
    read: u64,
}

impl Download {
    /// The next bytes; `None` at the end.
    ///
    /// # Errors
    /// When the connection fails, or ends before the file does.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        let piece = self.answer.piece().await?;
        self.read += piece.as_ref().map_or(0, Bytes::len) as u64;
        if piece.is_none() && self.length.is_some_and(|length| length != self.read) {
            return Err(ClientError::Truncated);
        }
        Ok(piece)
    }
}

/// A file being uploaded.
#[derive(Debug)]
pub struct Upload(mpsc::Sender<Bytes>);

impl Upload {
    /// Sends bytes. Waits until earlier bytes are in transit. Returns `false` if the call has
    /// ended.
    pub async fn send(&mut self, bytes: Bytes) -> bool {
        self.0.send(bytes).await.is_ok()
    }
}

/// Percent-encodes a text for a query.
fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => encoded.push(byte as char),
            byte => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

impl Client {
    fn files(&self, path: &str) -> String {
        let user = self.user().map_or_else(String::new, |user| format!("&username={}", encoded(user)));
        format!("/files?path={}{user}", encoded(path))
    }

    /// Reads a file.
    ///
    /// # Errors
    /// When there is no such file, or it is a directory.
    pub async fn download(&self, path: &str) -> Result<Download, ClientError> {
        self.downloaded("GET", &self.files(path)).await
    }

    /// Reads the changes of the root file system since [`Client::begin_layer`], as the archive of
    /// an image's layer.
    ///
    /// # Errors
    /// When no layer was begun, or a file cannot be read.
    pub async fn layer(&self) -> Result<Download, ClientError> {
        self.downloaded("POST", "/clade/layer").await
    }

    async fn downloaded(&self, method: &str, path: &str) -> Result<Download, ClientError> {
        let request = self.request(method, path).body(Outgoing::Whole(None));
        let mut answer = self.send(request.map_err(ClientError::Request)?).await?;
        if !answer.response.status().is_success() {
            return Err(refusal(&mut answer).await);
        }
        let length = answer.response.headers().get(CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Download { answer, length, read: 0 })
    }

    /// A stream of bytes to a file with these permissions, and the call that writes it. The call
    /// ends when the stream is dropped and the file is written. Drop the call first to abort the
    /// upload.
    pub fn upload(
        &self,
        path: &str,
        mode: Option<u32>,
    ) -> (Upload, impl Future<Output = Result<Written, ClientError>> + Send + use<>) {
        let (sender, pieces) = mpsc::channel(2);
        let mode = mode.map_or_else(String::new, |mode| format!("&mode={mode:o}"));
        let request = self
            .request("POST", &format!("{}{mode}", self.files(path)))
            .header(CONTENT_TYPE, "application/octet-stream");
        let request = request.body(Outgoing::Watched(pieces, Arc::default()));
        let client = self.clone();
        let call = async move {
            let mut answer = client.send(request.map_err(ClientError::Request)?).await?;
            if !answer.response.status().is_success() {
                return Err(refusal(&mut answer).await);
            }
            let bytes = answer.whole().await?;
            let [written] = written(&bytes)?;
            Ok(written)
        };
        (Upload(sender), call)
    }

    /// The information about an entry.
    ///
    /// # Errors
    /// When the entry does not exist.
    pub async fn stat(&self, path: &str) -> Result<EntryInfo, ClientError> {
        let request = PathRequest { path: path.to_owned() };
        Ok(self.call::<_, EntryResponse>("filesystem.Filesystem/Stat", &request).await?.entry)
    }

    /// The entries of a directory.
    ///
    /// # Errors
    /// When the directory does not exist.
    pub async fn list_dir(&self, path: &str) -> Result<Vec<EntryInfo>, ClientError> {
        let request = ListDirRequest { path: path.to_owned(), depth: 1 };
        let listed: ListDirResponse = self.call_for("filesystem.Filesystem/ListDir", &request, MAX_LIST).await?;
        Ok(listed.entries)
    }

    /// Makes a directory and its parents. The directory has the permissions `mode`, if given.
    ///
    /// # Errors
    /// When an entry of that name exists.
    pub async fn make_dir(&self, path: &str, mode: Option<u32>) -> Result<EntryInfo, ClientError> {
        let request = MakeDirRequest { path: path.to_owned(), mode };
        Ok(self.call::<_, EntryResponse>("filesystem.Filesystem/MakeDir", &request).await?.entry)
    }

    /// Removes an entry, recursively. Succeeds if the entry does not exist.
    ///
    /// # Errors
    /// When the entry cannot be removed.
    pub async fn remove(&self, path: &str) -> Result<(), ClientError> {
        let request = PathRequest { path: path.to_owned() };
        self.call::<_, Empty>("filesystem.Filesystem/Remove", &request).await.map(drop)
    }
}

/// The one file in an upload's answer.
fn written(bytes: &[u8]) -> Result<[Written; 1], ClientError> {
    clade_agent_proto::json::decode_list(bytes).map_err(ClientError::answer)
}
