# The common tasks. `just` lists them.

default:
    @just --list

# All tests; what a host lacks is skipped, and said so
test:
    cargo test --workspace

# All tests, and a skip is a failure
test-all: linux-guest
    CLADE_REQUIRE=kvm,uffd,linux,direct cargo test --workspace

# Models of the ownership words, over all interleavings
loom:
    RUSTFLAGS="--cfg loom" cargo test -p clade-memory --lib --release --target-dir target/loom loom

lint:
    cargo clippy --workspace --all-targets -- -D warnings
    cargo fmt --all --check

demo:
    cargo run --release -- demo

bench:
    cargo run --release -- bench fork --mem 512M,2G,4G
    cargo run --release -- bench freeze
    cargo run --release -- bench pin

# The Linux guest, from Debian's packages; cached
linux-guest:
    resources/linux/build.sh

# Advisories, licences, sources (needs cargo-deny)
deny:
    cargo deny check

ci:
    .ci/run

# A minute of each fuzz target (needs cargo-fuzz and a nightly compiler)
fuzz:
    for target in boot_load unpack serial cpu_hide; do cargo fuzz run "$target" -- -max_total_time=60; done
