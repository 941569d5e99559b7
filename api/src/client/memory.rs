//! A client of guests' memory.

use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::{Bytes, Incoming};

use super::{Client, ClientError, MAX_ANSWER, Payload, send, whole};
use crate::{MEDIA_TYPE, MemoryWritten, check_name};

impl Client {
    /// Reads the memory of a guest: [`MAX_MEMORY`](crate::MAX_MEMORY) bytes at most.
    ///
    /// # Errors
    /// As for any request. When there is no such memory: the contents of `bytes` are then
    /// undefined.
    pub async fn read_memory(&self, name: &str, address: u64, bytes: &mut [u8]) -> Result<(), ClientError> {
        let query = format!("address={address}&length={}", bytes.len());
        let mut body = self.memory(Method::GET, name, &query, Bytes::new()).await?;
        let (length, mut got) = (bytes.len(), 0);
        while let Some(frame) = body.frame().await {
            let data = frame?.into_data().unwrap_or_default();
            // The process may be compromised: excess bytes are dropped.
            if let Some(place) = bytes.get_mut(got..got + data.len()) {
                place.copy_from_slice(&data);
            }
            got += data.len();
            if got > length {
                break;
            }
        }
        if got == length { Ok(()) } else { Err(ClientError::ShortMemory { name: name.to_owned(), length, got }) }
    }

    /// Writes the memory of a guest: [`MAX_MEMORY`](crate::MAX_MEMORY) bytes at most.
    ///
    /// # Errors
    /// As for any request. When there is no such memory.
    pub async fn write_memory(&self, name: &str, address: u64, bytes: Bytes) -> Result<MemoryWritten, ClientError> {
        self.write(name, format!("address={address}"), bytes).await
    }

    /// Writes the memory of a guest, and interrupts one of its vCPUs.
    ///
    /// # Errors
    /// As for [`Client::write_memory`], and when there is no such vCPU.
    pub async fn write_memory_and_ring(
        &self,
        name: &str,
        address: u64,
        bytes: Bytes,
        vcpu: u64,
    ) -> Result<MemoryWritten, ClientError> {
        self.write(name, format!("address={address}&doorbell={vcpu}"), bytes).await
    }

    async fn write(&self, name: &str, query: String, bytes: Bytes) -> Result<MemoryWritten, ClientError> {
        let body = self.memory(Method::PUT, name, &query, bytes).await?;
        Ok(serde_json::from_slice(&whole(body, MAX_ANSWER).await?)?)
    }

    async fn memory(&self, method: Method, name: &str, query: &str, bytes: Bytes) -> Result<Incoming, ClientError> {
        check_name(name)?;
        let (uri, payload) = (format!("/v1/vms/{name}/memory?{query}"), Payload { bytes, media: MEDIA_TYPE });
        match &self.remote {
            Some(remote) => {
                let (stream, token) = remote.connect().await?;
                send(stream, Some(&token), method, &uri, payload).await
            }
            None => send(self.connect(name).await?, None, method, &uri, payload).await,
        }
    }
}
