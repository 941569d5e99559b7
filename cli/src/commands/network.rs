//! `clade network`: whether a VM's packets pass.

use clade_daemon::control::{Client, NetworkRequest, VmInfo};
use clade_devices::virtio::net::Link;
use clap::{Args, ValueEnum};
use hyper::Method;

use crate::commands::remote::ask;
use crate::commands::{Failure, Outcome, print_json};

/// Whether packets pass.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum NetworkState {
    /// They pass.
    #[value(alias = "on")]
    Open,
    /// None passes, in either direction: the host drops and counts them.
    #[value(alias = "off")]
    Closed,
}

impl From<NetworkState> for Link {
    fn from(state: NetworkState) -> Self {
        match state {
            NetworkState::Open => Self::Open,
            NetworkState::Closed => Self::Closed,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct NetworkArgs {
    /// The VM's name.
    pub(crate) name: String,
    /// Whether packets pass.
    #[arg(value_enum)]
    pub(crate) state: NetworkState,
    /// Print the VM as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn main(args: &NetworkArgs) -> Outcome {
    let request = NetworkRequest { network: args.state.into() };
    let info: VmInfo = ask(Client::default().request(Method::POST, &args.name, "/network", Some(&request)))?;
    if args.json { print_json(&info).map_err(Failure::run) } else { Ok(()) }
}
