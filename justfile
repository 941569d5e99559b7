# The common tasks. `just` lists them.

default:
    @just --list

# Unit tests and lints of the crates that differ from `base`: a minute or two
quick base="HEAD":
    .ci/quick {{base}}

# All tests; what a host lacks is skipped, and said so
test:
    cargo test --workspace

# All tests, and a skip is a failure
test-all: linux-guest
    CLADE_REQUIRE=kvm,uffd,linux,direct,tap cargo test --workspace

# All tests, each in a process of its own; a failure is looked at before it counts
nextest:
    .ci/tests nextest

# Models of the ownership words, over all interleavings
loom:
    .ci/protocol loom

# Mutations of the protocol's modules, one shard: `just mutants 0/8`
mutants shard="0/8":
    CLADE_MODEL_OPS=2000 cargo mutants --package clade-memory --shard {{shard}} --sharding round-robin

# Mutations of the lines that changed since `base`
mutants-diff base="HEAD~1":
    .ci/mutants {{base}}

# Schedules of the real code under shuttle: `just schedules 100000`
schedules count="5000":
    RUSTFLAGS="--cfg shuttle" CLADE_SCHEDULES={{count}} cargo test -p clade-memory --lib --release --target-dir target/shuttle shuttle -- --nocapture

# The specification: needs java
spec:
    spec/check
    spec/check --broken

# Traces of the code, replayed against the specification
trace:
    spec/check --graph
    cargo test -p clade-memory --features trace --lib trace::
    CLADE_TRACE=1 cargo test -p clade-memory --features trace --test model --test storm
    CLADE_TRACE=1 cargo test -p clade-memory --features trace,hazard --test hazard i3_

lint:
    cargo clippy --workspace --all-targets -- -D warnings
    cargo fmt --all --check

demo:
    cargo run --release -- demo

bench-all:
    cargo run --release -p clade-lab -- bench all

# Clade beside other VMMs: `just peers --firecracker FILE`.
peers *ARGS:
    benches/peers/compare.py --clade target/release/clade {{ARGS}}

bench:
    cargo run --release -p clade-lab -- bench fork --mem 512M,2G,4G
    cargo run --release -p clade-lab -- bench freeze
    cargo run --release -p clade-lab -- bench reset
    cargo run --release -p clade-lab -- bench rollback
    cargo run --release -p clade-lab -- bench restore
    cargo run --release -p clade-lab -- bench save
    cargo run --release -p clade-lab -- bench pin
    cargo run --release -p clade-lab -- bench disk
    cargo run --release -p clade-lab -- bench clones

# Ten minutes of DMA under forks with two vCPUs and with four, and the control run, which must find wrong bytes
stress:
    cargo run --release -p clade-lab -- stress dma --seconds 600
    cargo run --release -p clade-lab -- stress dma --seconds 600 --cpus 4
    cargo run --release -p clade-lab -- stress dma --seconds 5 --without-unshare

# The Linux guest, from Debian's packages; cached
linux-guest:
    resources/linux/build.sh

# The agent of guests, as a static program
agent:
    resources/agent/build.sh

# Advisories, licences, sources (needs cargo-deny)
deny:
    cargo deny check

# Requests made from the OpenAPI document, two minutes (needs root, and schemathesis from PyPI)
api-fuzz seconds="120":
    cargo build
    .ci/api-fuzz {{seconds}}

ci:
    .ci/run

# With all of the long checks
ci-full:
    .ci/run --full

# The long checks alone, or the named ones: `just ci-long stress loom`
ci-long *names:
    .ci/run --long {{names}}

# A minute of each fuzz target, guided by coverage
fuzz:
    fuzz/run.sh 60
