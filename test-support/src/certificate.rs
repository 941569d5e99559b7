//! Certificates of this host, made by openssl.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes a self-signed certificate of 127.0.0.1, and of `names` (such as `DNS:*.box.test`), in
/// `dir`. Returns its file and that of its key. None, after printing the reason, without openssl.
///
/// # Panics
/// When openssl fails.
#[must_use]
pub fn certificate(dir: &Path, names: &[&str]) -> Option<(PathBuf, PathBuf)> {
    let (certificate, key) = (dir.join("cert.crt"), dir.join("key.pem"));
    let names = [&["IP:127.0.0.1"], names].concat().join(",");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=clade test", "-addext", &format!("subjectAltName={names}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate)
        .output();
    let Ok(made) = made else {
        crate::require::skipped("openssl is not installed");
        return None;
    };
    assert!(made.status.success(), "{made:?}");
    Some((certificate, key))
}
