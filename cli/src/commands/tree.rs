//! `clade tree`: VMs and their descendants, with the memory of each.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use clade_api::{CheckpointInfo, Client, ClientError, EndedVm, LayerInfo, VmState, VmStats, pages_kib};
use hyper::Method;
use serde::Serialize;

use crate::commands::ps::{by_name, columns};
use crate::commands::remote::{ask, state_name};
use crate::commands::units::{show_age, show_size};
use crate::commands::{Failure, Outcome, print_json};

#[derive(Debug, clap::Args)]
pub(crate) struct TreeArgs {
    /// Print JSON instead of a drawing.
    #[arg(long)]
    json: bool,
}

/// The reported ages of VMs are of instants within so many seconds of each other.
const ASKED_WITHIN_S: f64 = 6.0;

/// The kind of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum NodeKind {
    Running,
    Paused,
    Suspended,
    Stopped,
    /// An ended VM with descendants.
    Ended,
    Checkpoint,
}

impl NodeKind {
    fn name(self) -> &'static str {
        match self {
            Self::Running => state_name(VmState::Running),
            Self::Paused => state_name(VmState::Paused),
            Self::Suspended => state_name(VmState::Suspended),
            Self::Stopped => state_name(VmState::Stopped),
            Self::Ended => "ended",
            Self::Checkpoint => "checkpoint",
        }
    }

    fn of(state: VmState) -> Self {
        match state {
            VmState::Running => Self::Running,
            VmState::Paused => Self::Paused,
            VmState::Suspended => Self::Suspended,
            VmState::Stopped => Self::Stopped,
        }
    }
}

/// A VM or a checkpoint with its descendants.
#[derive(Debug, PartialEq, Serialize)]
struct TreeNode {
    name: String,
    kind: NodeKind,
    /// Memory that is freed with it, in KiB; None if it has no memory of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    private_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shared_kib: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    age_s: Option<f64>,
    children: Vec<TreeNode>,
}

/// All descendants of one VM.
#[derive(Debug, PartialEq, Serialize)]
struct Clade {
    root: TreeNode,
    /// Running VMs.
    vms: usize,
    checkpoints: usize,
    /// Private memory of all of them, in KiB.
    private_kib: u64,
    /// Memory of the layers that provide their pages, each layer once, in KiB.
    layers_kib: u64,
    layers: usize,
}

/// The known VMs of the directory.
struct Known<'a> {
    vms: &'a [VmStats],
    ended: &'a [EndedVm],
    checkpoints: &'a [CheckpointInfo],
}

/// A place in the tree: a running VM by name, or an ended one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum TreeParent {
    Vm(String),
    Ended(String),
}

impl Known<'_> {
    fn vm(&self, name: &str) -> Option<&VmStats> {
        self.vms.iter().find(|vm| vm.name == name)
    }

    /// Returns the parent's place for a node `generation` forks deep and `age_s` old. A VM of
    /// another depth, or a younger one, has only inherited the name, and is not the parent.
    fn parent(&self, parent: &str, generation: u32, age_s: f64) -> TreeParent {
        let is_it = |vm: &VmStats| vm.generation + 1 == generation && vm.age_s + ASKED_WITHIN_S >= age_s;
        if self.vm(parent).is_some_and(is_it) {
            TreeParent::Vm(parent.to_owned())
        } else {
            TreeParent::Ended(parent.to_owned())
        }
    }

    fn parent_of(&self, checkpoint: &CheckpointInfo) -> TreeParent {
        let saved = || checkpoint.snapshot.as_ref().map(|dir| dir.display().to_string());
        match &checkpoint.vm {
            Some(vm) => self.parent(vm, checkpoint.generation, checkpoint.age_s),
            None => TreeParent::Ended(saved().unwrap_or_default()),
        }
    }

    /// Returns the children of each place, and the roots.
    fn descent(&self) -> (BTreeMap<TreeParent, Vec<TreeParent>>, Vec<TreeParent>) {
        let mut children: BTreeMap<TreeParent, Vec<TreeParent>> = BTreeMap::new();
        let mut roots = Vec::new();
        let mut ended: BTreeSet<String> = BTreeSet::new();
        let mut todo: Vec<(TreeParent, Option<TreeParent>)> = self
            .vms
            .iter()
            .map(|vm| {
                let parent = vm.parent.as_deref().map(|parent| self.parent(parent, vm.generation, vm.age_s));
                (TreeParent::Vm(vm.name.clone()), parent)
            })
            .collect();
        let needed: Vec<TreeParent> = self.checkpoints.iter().map(|checkpoint| self.parent_of(checkpoint)).collect();
        let mut ghosts: Vec<String> = Vec::new();
        let note = |place: &TreeParent, ghosts: &mut Vec<String>| {
            if let TreeParent::Ended(name) = place {
                ghosts.push(name.clone());
            }
        };
        todo.iter().filter_map(|(_, parent)| parent.as_ref()).chain(&needed).for_each(|place| note(place, &mut ghosts));
        while let Some(name) = ghosts.pop() {
            if !ended.insert(name.clone()) {
                continue;
            }
            // The record of the ended VM has its parent.
            let record = self.ended.iter().find(|record| record.name == name);
            let parent = record.and_then(|record| Some(self.parent(record.parent.as_deref()?, record.generation, 0.0)));
            let parent = parent.filter(|place| !matches!(place, TreeParent::Ended(name) if ended.contains(name)));
            parent.iter().for_each(|place| note(place, &mut ghosts));
            todo.push((TreeParent::Ended(name), parent));
        }
        for (place, parent) in todo {
            match parent {
                Some(parent) => children.entry(parent).or_default().push(place),
                None => roots.push(place),
            }
        }
        (children, roots)
    }

    fn node(&self, place: &TreeParent, children: &BTreeMap<TreeParent, Vec<TreeParent>>) -> TreeNode {
        let checkpoints = self.checkpoints.iter().filter(|checkpoint| self.parent_of(checkpoint) == *place);
        let mut below: Vec<TreeNode> = checkpoints
            .map(|checkpoint| TreeNode {
                name: checkpoint.name.clone(),
                kind: NodeKind::Checkpoint,
                private_kib: None,
                shared_kib: None,
                age_s: Some(checkpoint.age_s),
                children: Vec::new(),
            })
            .collect();
        below.extend(children.get(place).into_iter().flatten().map(|child| self.node(child, children)));
        below.sort_by(|one, other| by_name(&one.name, &other.name));
        match place {
            TreeParent::Vm(name) => {
                let vm = self.vm(name);
                TreeNode {
                    name: name.clone(),
                    kind: vm.map_or(NodeKind::Ended, |vm| NodeKind::of(vm.state)),
                    private_kib: vm.map(|vm| vm.memory.private_kib),
                    shared_kib: vm.map(|vm| pages_kib(vm.memory.pages.shared)),
                    age_s: vm.map(|vm| vm.age_s),
                    children: below,
                }
            }
            TreeParent::Ended(name) => TreeNode {
                name: name.clone(),
                kind: NodeKind::Ended,
                private_kib: None,
                shared_kib: None,
                age_s: None,
                children: below,
            },
        }
    }

    fn clades(&self) -> Vec<Clade> {
        let (children, roots) = self.descent();
        let mut clades: Vec<Clade> = roots.iter().map(|root| self.clade(self.node(root, &children))).collect();
        clades.sort_by(|one, other| by_name(&one.root.name, &other.root.name));
        clades
    }

    fn clade(&self, root: TreeNode) -> Clade {
        let (mut vms, mut checkpoints) = (Vec::new(), 0);
        let mut todo = vec![&root];
        while let Some(node) = todo.pop() {
            match node.kind {
                NodeKind::Checkpoint => checkpoints += 1,
                NodeKind::Ended => {}
                NodeKind::Running | NodeKind::Paused | NodeKind::Suspended | NodeKind::Stopped => {
                    vms.extend(self.vm(&node.name));
                }
            }
            todo.extend(&node.children);
        }
        let layers: BTreeMap<&str, &LayerInfo> =
            vms.iter().flat_map(|vm| &vm.memory.layers).map(|layer| (layer.file.as_str(), layer)).collect();
        let private_kib = vms.iter().map(|vm| vm.memory.private_kib).sum();
        let layers_kib = layers.values().filter_map(|layer| layer.resident_kib).sum();
        let (vms, layers) = (vms.len(), layers.len());
        Clade { vms, checkpoints, private_kib, layers_kib, layers, root }
    }
}

/// Returns the rows of a node and of its descendants. `before` is drawn left of it, `beside` left
/// of the descendants.
fn rows(node: &TreeNode, before: &str, beside: &str, out: &mut Vec<Vec<String>>) {
    let size = |kib: Option<u64>| kib.map_or_else(|| "-".to_owned(), |kib| show_size(kib << 10));
    let age = node.age_s.map_or_else(|| "-".to_owned(), show_age);
    let name = format!("{before}{}", node.name);
    out.push(vec![name, node.kind.name().to_owned(), size(node.private_kib), size(node.shared_kib), age]);
    for (at, child) in node.children.iter().enumerate() {
        let is_last = at + 1 == node.children.len();
        let (before, under) = if is_last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        rows(child, &format!("{beside}{before}"), &format!("{beside}{under}"), out);
    }
}

fn counted(count: usize, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}

fn drawn(clades: &[Clade]) -> String {
    let mut table = vec![["NAME", "STATE", "PRIVATE", "SHARED", "AGE"].map(String::from).into()];
    clades.iter().for_each(|clade| rows(&clade.root, "", "", &mut table));
    let mut out = columns(&table);
    for clade in clades {
        out += &format!(
            "{}: {}, {}, {} private, {} in {}\n",
            clade.root.name,
            counted(clade.vms, "VM"),
            counted(clade.checkpoints, "checkpoint"),
            show_size(clade.private_kib << 10),
            show_size(clade.layers_kib << 10),
            counted(clade.layers, "layer"),
        );
    }
    out
}

pub(super) fn main(args: &TreeArgs) -> Outcome {
    let client = Client::default();
    let (gathered, checkpoints, ended) = ask(async {
        let gathered = client.gather(client.all_names().await?).await;
        let ended = client.ended().await?;
        let checkpoints = client.supervisor::<Vec<CheckpointInfo>>(Method::GET, "/v1/checkpoints", None::<&()>);
        match checkpoints.await {
            Err(ClientError::NoSupervisor { .. }) => Ok((gathered, Vec::new(), ended)),
            other => other.map(|checkpoints| (gathered, checkpoints, ended)),
        }
    })?;
    let clades = Known { vms: &gathered.vms, ended: &ended, checkpoints: &checkpoints }.clades();
    if args.json {
        print_json(&clades).map_err(Failure::run)?;
    } else {
        io::stdout().write_all(drawn(&clades).as_bytes()).map_err(Failure::run)?;
    }
    if !gathered.silent.is_empty() {
        eprintln!("clade: no answer in time: {}", gathered.silent.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
