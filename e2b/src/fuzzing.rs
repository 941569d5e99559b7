//! Entry points of fuzz targets: a client's connection, and its effect on a guest.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::gateway::{Gateway, Options};
use crate::listen::{self, router};
use crate::seats::Seats;

/// Opens a gateway that keeps its files in `dir`, with the domain `box.test` and one sandbox:
/// `ibox`, whose VM's vsock socket is `socket`. It has no supervisor.
///
/// # Panics
/// When its files cannot be written.
#[must_use]
pub fn gateway(dir: &Path, socket: &Path) -> Gateway {
    let options = Options {
        dir: dir.to_owned(),
        keys: dir.join("keys.json"),
        domain: Some("box.test".to_owned()),
        templates: None,
        snapshots: None,
        quotas: crate::Quotas::default(),
    };
    let gateway = Gateway::of_socket(options).unwrap_or_else(|error| panic!("a gateway: {error}"));
    let record = json!({
        "id": "ibox", "template": "base", "owner": "one", "metadata": {}, "envs": {},
        "started_at": "1970-01-01T00:00:00Z", "end_at": "2100-01-01T00:00:00Z", "paused": false,
        "auto_pause": false, "auto_resume": false, "cpus": 1, "mib": 64, "socket": socket,
    });
    let record = serde_json::from_value(record).unwrap_or_else(|error| panic!("a record: {error}"));
    gateway.0.sandboxes.insert(record).unwrap_or_else(|error| panic!("a sandbox: {error}"));
    gateway
}

/// Answers a client's connection, up to its end.
pub async fn answer(gateway: &Gateway, client: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let seat = Seats::new(1).take(std::net::Ipv4Addr::LOCALHOST.into()).await;
    listen::answer(client, router(gateway), Arc::new(seat)).await;
}
