//! E2B's API beside the supervisor's own, and the keys of its clients.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clade_e2b::{
    ApiKeys, BoundPort, Gateway, GatewayFiles, KeysError, Options, Quotas, Scope, TemplateStore, Tls, TlsFiles,
};
use clade_supervisor::Supervisor;
use clade_vmm::error_chain;
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::commands::kept::checkpoint_dir;
use crate::commands::run::say;
use crate::commands::{Failure, Outcome, Table, print_json};

/// Time limit of calls in progress after the end of the supervisor.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// The address, as given to `clade serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct E2bArgs {
    /// Serve E2B's API too, at this address, for clients with a key: a loopback address, or one with
    /// `--e2b-tls`. Port 0 is a free one.
    #[arg(long, value_name = "ADDR")]
    e2b: Option<SocketAddr>,
    /// The files of a certificate and of its private key, in PEM form. They are read again when they
    /// change.
    #[arg(long, value_name = "CERT,KEY", value_parser = tls_files, requires = "e2b")]
    e2b_tls: Option<TlsFiles>,
    /// The domain whose subdomains PORT-ID are sandboxes' ports, with a port that differs from 443.
    #[arg(long, value_name = "DOMAIN[:PORT]", requires = "e2b")]
    e2b_domain: Option<String>,
    /// Limits of the sandboxes and snapshots of each owner of keys, memory in MiB.
    #[arg(long, value_name = "sandboxes=N,memory=MIB,snapshots=N", default_value_t, requires = "e2b")]
    e2b_quota: Quotas,
    #[command(flatten)]
    keys: KeysPath,
}

/// The place of keys.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct KeysPath {
    /// The file of keys of E2B's API. Default: `clade/keys.json` in `XDG_CONFIG_HOME` or
    /// `~/.config`.
    #[arg(long = "keys", value_name = "FILE")]
    path: Option<PathBuf>,
}

impl KeysPath {
    fn path(&self) -> Result<PathBuf, Failure> {
        if let Some(path) = &self.path {
            return Ok(path.clone());
        }
        let of = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = of("XDG_CONFIG_HOME").or_else(|| of("HOME").map(|home| home.join(".config")));
        let dir = dir.ok_or_else(|| anyhow::anyhow!("--keys is not given, and HOME is not set"));
        Ok(dir.map_err(Failure::input)?.join("clade/keys.json"))
    }
}

/// `clade key`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum KeyCommand {
    /// Make a key and print it, this once. Its owner owns its sandboxes and snapshots.
    Add(AddArgs),
    /// List the keys' names.
    Ls(KeyListArgs),
    /// Revoke a key. Its sandboxes run on.
    Rm(KeyRemoveArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct AddArgs {
    /// Its name.
    name: String,
    /// The owner of its sandboxes and snapshots. Several keys may have one owner. Default: the
    /// key's name.
    #[arg(long, value_name = "NAME")]
    owner: Option<String>,
    /// The permitted calls: all, or those that change nothing.
    #[arg(long, value_name = "all|read", default_value = "all")]
    scope: Scope,
    #[command(flatten)]
    keys: KeysPath,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KeyListArgs {
    #[command(flatten)]
    keys: KeysPath,
    /// Print JSON: an array of the keys, without the secret parts.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct KeyRemoveArgs {
    /// Its name.
    name: String,
    #[command(flatten)]
    keys: KeysPath,
}

/// Parses `CERT,KEY`.
fn tls_files(text: &str) -> Result<TlsFiles, String> {
    match text.split_once(',') {
        Some((certificate, key)) if !certificate.is_empty() && !key.is_empty() => {
            Ok(TlsFiles { certificate: certificate.into(), key: key.into() })
        }
        _ => Err(format!("{text:?} is not two files, as in cert.pem,key.pem")),
    }
}

fn failure(error: KeysError) -> Failure {
    match error {
        KeysError::File { .. } => Failure::run(error),
        _ => Failure::input(error),
    }
}

#[derive(Serialize)]
struct KeyRow {
    name: String,
    owner: String,
    scope: Scope,
}

pub(super) fn key(command: &KeyCommand) -> Outcome {
    let keys = |file: &KeysPath| file.path().map(|path| ApiKeys::new(&path));
    match command {
        KeyCommand::Add(args) => {
            let key = keys(&args.keys)?.add(&args.name, args.owner.as_deref(), args.scope).map_err(failure)?;
            writeln!(io::stdout(), "{key}").map_err(Failure::run)?;
        }
        KeyCommand::Rm(args) => keys(&args.keys)?.remove(&args.name).map_err(failure)?,
        KeyCommand::Ls(args) => {
            let all = keys(&args.keys)?.list().map_err(failure)?;
            let rows: Vec<KeyRow> = all
                .into_iter()
                .map(|key| KeyRow { owner: key.owner().to_owned(), name: key.name, scope: key.scope })
                .collect();
            if args.json {
                return print_json(&rows).map_err(Failure::run);
            }
            let mut table = Table::new(["NAME", "OWNER", "SCOPE"]);
            for row in rows {
                table.words([row.name, row.owner, row.scope.to_string()]);
            }
            table.print().map_err(Failure::run)?;
        }
    }
    Ok(())
}

impl E2bArgs {
    /// Binds the port of the API, if requested.
    pub(super) fn bind(&self, dir: &Path, runtime: &Handle) -> Result<Option<BoundApi>, Failure> {
        let Some(address) = self.e2b else { return Ok(None) };
        let templates = TemplateStore::of_user()
            .inspect_err(
                |error| tracing::warn!(error = %error_chain(error), "E2B's API has checkpoints as templates alone"),
            )
            .ok();
        let (keys, domain) = (self.keys.path()?, self.e2b_domain.clone());
        // Beside the checkpoints, which have names of another form.
        let snapshots = checkpoint_dir(dir).map(|dir| dir.join(".e2b-snapshots"));
        let options = Options { dir: dir.to_owned(), keys, domain, templates, snapshots, quotas: self.e2b_quota };
        let files = GatewayFiles::open(options).map_err(Failure::input)?;
        let tls = self.e2b_tls.clone().map(Tls::open).transpose().map_err(Failure::input)?;
        let _runtime = runtime.enter();
        let port = BoundPort::bind(address, tls).map_err(Failure::input)?;
        Ok(Some(BoundApi { port, files }))
    }
}

/// E2B's API at a port that is bound, and not served yet.
pub(super) struct BoundApi {
    port: BoundPort,
    files: GatewayFiles,
}

impl BoundApi {
    /// Serves the API over the VMs of `supervisor` until the runtime ends.
    pub(super) fn serve(self, supervisor: &Supervisor, runtime: &Handle) -> ServedApi {
        let (url, gateway) = (self.port.url(), self.files.gateway(Arc::new(supervisor.clone())));
        runtime.spawn(self.port.serve(gateway.clone()));
        say!("E2B's API is at {url}");
        ServedApi(gateway)
    }
}

/// E2B's API, which is served.
pub(super) struct ServedApi(Gateway);

impl ServedApi {
    /// Waits for changes in progress. The supervisor has been closed: they end, and stop the VMs that they
    /// have made.
    pub(super) fn finish(&self, runtime: &Handle) {
        if runtime.block_on(async { timeout(FINISH_TIMEOUT, self.0.changes_ended()).await.is_err() }) {
            tracing::warn!("calls of E2B's API have not ended in time: the next supervisor stops what they leave");
        }
    }
}
