//! A client of guests' memory.

use hyper::Method;
use hyper::body::Bytes;

use super::{Client, ClientError, Payload, send, whole};
use crate::control::ram::{MEDIA_TYPE, MemoryWritten};
use crate::fleet::check_name;

impl Client {
    /// Reads the memory of a guest: `length` bytes, [`MAX_MEMORY`](crate::control::MAX_MEMORY) at most.
    ///
    /// # Errors
    /// As for any request. When there is no such memory.
    pub async fn read_memory(&self, name: &str, address: u64, length: usize) -> Result<Bytes, ClientError> {
        let query = format!("address={address}&length={length}");
        let bytes = self.memory(Method::GET, name, &query, Bytes::new()).await?;
        if bytes.len() == length {
            return Ok(bytes);
        }
        Err(ClientError::ShortMemory { name: name.to_owned(), length, got: bytes.len() })
    }

    /// Writes the memory of a guest: [`MAX_MEMORY`](crate::control::MAX_MEMORY) bytes at most.
    ///
    /// # Errors
    /// As for any request. When there is no such memory.
    pub async fn write_memory(&self, name: &str, address: u64, bytes: Bytes) -> Result<MemoryWritten, ClientError> {
        Ok(serde_json::from_slice(&self.memory(Method::PUT, name, &format!("address={address}"), bytes).await?)?)
    }

    async fn memory(&self, method: Method, name: &str, query: &str, bytes: Bytes) -> Result<Bytes, ClientError> {
        check_name(name)?;
        let (uri, payload) = (format!("/v1/vms/{name}/memory?{query}"), Payload { bytes, media: MEDIA_TYPE });
        let body = match &self.remote {
            Some(remote) => {
                let (stream, token) = remote.connect().await?;
                send(stream, Some(&token), method, &uri, payload).await?
            }
            None => send(self.connect(name).await?, None, method, &uri, payload).await?,
        };
        whole(body).await
    }
}
