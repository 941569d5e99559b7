//! `clade network`: the state of a VM's network, and its egress rules.

use clade_api::{NetworkRequest, VmInfo};
use clade_devices::virtio::net::{EgressRule, Link};
use clap::{Args, ValueEnum};
use hyper::Method;

use crate::commands::remote::{ask, supervised};
use crate::commands::{Failure, Outcome, print_json};

/// Whether packets pass.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum NetworkState {
    /// Packets pass.
    #[value(alias = "on")]
    Open,
    /// No packet passes, in either direction: the host drops and counts them.
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
    #[arg(value_enum, required_unless_present_any = ["egress", "no_egress"])]
    pub(crate) state: Option<NetworkState>,
    /// An egress rule, in the form of clade run. The rules replace all existing ones. Repeatable.
    #[arg(long, value_name = "RULE")]
    pub(crate) egress: Vec<EgressRule>,
    /// Remove all egress rules.
    #[arg(long, conflicts_with = "egress")]
    pub(crate) no_egress: bool,
    /// Keep this many layers of rules, from the first on.
    #[arg(long, value_name = "LAYERS", default_value_t = 0)]
    pub(crate) keep: usize,
    /// Print the VM as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn main(args: &NetworkArgs) -> Outcome {
    let egress = (args.no_egress || !args.egress.is_empty()).then(|| args.egress.clone());
    let request = NetworkRequest { network: args.state.map(Into::into), egress, keep: args.keep };
    // The supervisor's part of it: interfaces of the host.
    let client = supervised(&args.name)?;
    let info: VmInfo = ask(client.of_vm(Method::POST, &args.name, "/network", Some(&request)))?;
    if args.json { print_json(&info).map_err(Failure::run) } else { Ok(()) }
}
