//! Any stream of envelopes, in any pieces: it is refused, or parsed as in one piece.
#![no_main]

use clade_agent_proto::{Envelope, EnvelopeError, Envelopes};
use libfuzzer_sys::fuzz_target;

const MAX: usize = 300;

fn read(bytes: &[u8], cut: usize) -> (Vec<Envelope>, Result<(), EnvelopeError>) {
    let (mut reader, mut envelopes) = (Envelopes::new(MAX), Vec::new());
    for chunk in bytes.chunks(cut) {
        reader.push(chunk);
        loop {
            match reader.next_envelope() {
                Ok(Some(envelope)) => {
                    assert!(envelope.message.len() <= MAX);
                    envelopes.push(envelope);
                }
                Ok(None) => break,
                Err(error) => return (envelopes, Err(error)),
            }
        }
    }
    let end = reader.finish();
    (envelopes, end)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    assert_eq!(read(bytes, usize::from(cut).max(1)), read(bytes, bytes.len().max(1)));
});
