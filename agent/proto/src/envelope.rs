//! Envelopes: a flag, a length of four bytes, and a message.

use thiserror::Error;

use crate::code::{EndOfStream, RpcError};
use crate::json;

/// Set in the flags of a stream's last message.
pub const END_OF_STREAM: u8 = 2;
/// Set in the flags of a compressed message, which is not supported.
pub const COMPRESSED: u8 = 1;
const HEAD: usize = 5;

/// One message of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// [`END_OF_STREAM`], or 0.
    pub flags: u8,
    /// The message.
    pub message: Vec<u8>,
}

/// Why a stream cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EnvelopeError {
    /// The length exceeds the limit.
    #[error("a message of {length} bytes; {max} are allowed")]
    TooLong {
        /// The length in the envelope.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// An unknown flag, or compression.
    #[error("an envelope with the flags {flags:#x}")]
    Flags {
        /// The flags.
        flags: u8,
    },
    /// The stream ended within an envelope.
    #[error("the stream ends within a message, {missing} bytes before its end")]
    Truncated {
        /// How many bytes are missing.
        missing: usize,
    },
}

/// Extracts envelopes from a stream of bytes. Buffers at most one message and one chunk.
#[derive(Debug)]
pub struct Envelopes {
    buffer: Vec<u8>,
    taken: usize,
    max: usize,
}

impl Envelopes {
    /// A reader of messages of up to `max` bytes.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { buffer: Vec::new(), taken: 0, max }
    }

    /// Adds received bytes. All envelopes must be taken out before the next call.
    pub fn push(&mut self, chunk: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(chunk);
    }

    /// The length in the head of the incomplete message.
    #[must_use]
    pub fn announced(&self) -> usize {
        self.rest().get(1..HEAD).map_or(0, length)
    }

    fn rest(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    /// The next complete message.
    ///
    /// # Errors
    /// When the flags or the length are not allowed.
    pub fn next_envelope(&mut self) -> Result<Option<Envelope>, EnvelopeError> {
        let rest = self.rest();
        let Some(head) = rest.get(..HEAD) else { return Ok(None) };
        let flags = head[0];
        if flags & !END_OF_STREAM != 0 {
            return Err(EnvelopeError::Flags { flags });
        }
        let length = length(&head[1..]);
        if length > self.max {
            return Err(EnvelopeError::TooLong { length, max: self.max });
        }
        let Some(message) = rest[HEAD..].get(..length) else { return Ok(None) };
        let message = message.to_vec();
        self.taken += HEAD + length;
        if self.taken == self.buffer.len() {
            // The buffer of a long message is not kept.
            (self.buffer, self.taken) = (Vec::new(), 0);
        }
        Ok(Some(Envelope { flags, message }))
    }

    /// Checks that the stream does not end here in the middle of a message.
    ///
    /// # Errors
    /// When it does.
    pub fn finish(&self) -> Result<(), EnvelopeError> {
        let rest = self.rest().len();
        if rest == 0 {
            return Ok(());
        }
        let wanted = HEAD + if rest < HEAD { 0 } else { self.announced() };
        Err(EnvelopeError::Truncated { missing: wanted.saturating_sub(rest) })
    }
}

fn length(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte))
}

/// A message in its envelope.
#[must_use]
pub fn seal<T: serde::Serialize>(message: &T) -> Vec<u8> {
    with_flags(0, message)
}

/// The end of a stream.
#[must_use]
pub fn seal_end(error: Option<RpcError>) -> Vec<u8> {
    with_flags(END_OF_STREAM, &EndOfStream { error })
}

fn with_flags<T: serde::Serialize>(flags: u8, message: &T) -> Vec<u8> {
    let mut bytes = vec![flags, 0, 0, 0, 0];
    bytes.extend(json::encode(message));
    // Messages are shorter than 4 GiB, because their parts are bounded.
    let length = u32::try_from(bytes.len() - HEAD).unwrap_or(u32::MAX);
    bytes[1..HEAD].copy_from_slice(&length.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8),
            cut in 1usize..40,
        ) {
            let mut bytes = Vec::new();
            for message in &messages {
                bytes.push(0);
                bytes.extend((message.len() as u32).to_be_bytes());
                bytes.extend(message);
            }
            let (mut reader, mut read) = (Envelopes::new(200), Vec::new());
            for chunk in bytes.chunks(cut) {
                reader.push(chunk);
                while let Some(envelope) = reader.next_envelope().unwrap() {
                    read.push(envelope.message);
                }
            }
            prop_assert_eq!(read, messages);
            prop_assert_eq!(reader.finish(), Ok(()));
        }
    }

    #[test]
    fn lengths_flags_and_ends_are_checked() {
        let mut reader = Envelopes::new(4);
        reader.push(&[0, 0, 0, 0, 5]);
        assert_eq!(reader.next_envelope(), Err(EnvelopeError::TooLong { length: 5, max: 4 }));
        let mut reader = Envelopes::new(4);
        reader.push(&[COMPRESSED, 0, 0, 0, 0]);
        assert_eq!(reader.next_envelope(), Err(EnvelopeError::Flags { flags: 1 }));
        let mut reader = Envelopes::new(4);
        reader.push(&[0, 0, 0, 0, 3, b'{']);
        assert_eq!(reader.next_envelope(), Ok(None));
        assert_eq!(reader.finish(), Err(EnvelopeError::Truncated { missing: 2 }));
    }

    #[test]
    fn an_end_says_why() {
        assert_eq!(&seal_end(None)[..], b"\x02\0\0\0\x02{}");
        let end = seal_end(Some(RpcError::invalid("no")));
        assert_eq!(&end[5..], br#"{"error":{"code":"invalid_argument","message":"no"}}"#);
    }
}
