//! Builds the bare guest with the same compiler as the host crates, for the same target.
//!
//! The guest is a freestanding program, but it needs no target of its own: a `no_std`, `no_main` binary with a linker
//! script is the same machine code on `x86_64-unknown-linux-gnu`, which every toolchain has.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    for input in ["build.rs", "guest", "src/abi.rs", "src/abi"] {
        println!("cargo::rerun-if-changed={input}");
    }
    let target = variable("TARGET");
    assert!(
        target.starts_with("x86_64-") && target.contains("linux"),
        "the bare guest can be built for x86_64 Linux only, not for {target}"
    );

    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = package.join("guest");
    let image = Path::new(&variable("OUT_DIR")).join("clade-bare");

    let mut rustc = Command::new(variable("RUSTC"));
    rustc
        .args(["--crate-name", "clade_bare", "--crate-type", "bin", "--edition", "2024", "--target", &target])
        .args(["-C", "opt-level=3", "-C", "codegen-units=1", "-C", "panic=abort", "-C", "force-unwind-tables=no"])
        .args(["-C", "relocation-model=static", "-C", "relro-level=off", "-C", "strip=debuginfo"])
        .arg("--remap-path-prefix")
        .arg(format!("{}=clade-guests", package.display()));
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--gc-sections",
        "-Wl,--build-id=none",
        "-Wl,-z,noexecstack",
    ] {
        rustc.arg("-C").arg(format!("link-arg={argument}"));
    }
    rustc.arg("-C").arg(format!("link-arg=-Wl,-T,{}", guest.join("link.ld").display()));
    if target.ends_with("musl") {
        // Or the compiler would add the start files that it brings along.
        rustc.args(["-C", "link-self-contained=no"]);
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    rustc.arg("-o").arg(&image).arg(guest.join("main.rs"));

    let status = rustc.status().expect("the compiler named by RUSTC can be run");
    assert!(status.success(), "the bare guest does not build: {status}");
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo did not set {name} to a string: {error}"))
}
