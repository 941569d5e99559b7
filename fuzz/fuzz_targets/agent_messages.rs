//! Any text as each message, of the agent's clients and of the agent: it is refused, or keeps its
//! value when it is written again.
#![no_main]

use clade_agent_proto::api::{Generation, Init, Metrics, Ready};
use clade_agent_proto::code::{EndOfStream, RpcError};
use clade_agent_proto::filesystem::{
    EntryResponse, ListDirRequest, ListDirResponse, MoveRequest, PathRequest, WatchDirResponse, WatchRequest,
    WatcherEvents,
};
use clade_agent_proto::process::{
    ConnectRequest, EventResponse, ListResponse, SendInputRequest, SendSignalRequest, StartRequest, StreamInputRequest,
    UpdateRequest,
};
use clade_agent_proto::{decode, encode};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fn check<T: Serialize + DeserializeOwned>(text: &[u8]) {
    let Ok(message) = decode::<T>(text) else { return };
    let written = encode(&message);
    let again = decode::<T>(&written).expect("what was written can be read");
    assert_eq!(encode(&again), written);
}

fuzz_target!(|text: &[u8]| {
    check::<StartRequest>(text);
    check::<ConnectRequest>(text);
    check::<UpdateRequest>(text);
    check::<SendInputRequest>(text);
    check::<StreamInputRequest>(text);
    check::<SendSignalRequest>(text);
    check::<PathRequest>(text);
    check::<MoveRequest>(text);
    check::<ListDirRequest>(text);
    check::<WatchRequest>(text);
    check::<Init>(text);
    check::<Generation>(text);
    check::<EventResponse>(text);
    check::<ListResponse>(text);
    check::<EntryResponse>(text);
    check::<ListDirResponse>(text);
    check::<WatchDirResponse>(text);
    check::<WatcherEvents>(text);
    check::<EndOfStream>(text);
    check::<RpcError>(text);
    check::<Ready>(text);
    let _ = decode::<Metrics>(text);
});
