//! Egress rules: the addresses and ports to which a guest may send.
//!
//! The device judges a copy of each packet, which the guest cannot change any more, and sends that
//! copy. A packet that cannot be parsed is dropped.
//!
//! A policy is a list of layers, each a list of rules. In a layer the first rule that matches
//! decides. Without a match the layer drops the packet if it has an allow rule, and passes it
//! otherwise. A packet must pass every layer, so an added layer can only narrow the policy.

mod frame;
mod rule;
#[cfg(feature = "schema")]
mod schema;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::mac::Mac;
pub(super) use frame::MAX_HEADERS;
use frame::{ParsedPacket, parse};
use rule::{Decision, Verdict};
pub use rule::{EgressError, EgressRule};

/// Maximum number of rules of a policy, in all of its layers.
pub const MAX_RULES: usize = 256;

/// The addresses and ports to which a guest may send; all of them without rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Vec<EgressRule>>", into = "Vec<Vec<EgressRule>>")]
pub struct Egress {
    layers: Vec<Vec<EgressRule>>,
}

impl TryFrom<Vec<Vec<EgressRule>>> for Egress {
    type Error = EgressError;

    fn try_from(mut layers: Vec<Vec<EgressRule>>) -> Result<Self, EgressError> {
        layers.retain(|layer| !layer.is_empty());
        let rules = layers.iter().map(Vec::len).sum();
        if rules > MAX_RULES { Err(EgressError::TooMany { rules }) } else { Ok(Self { layers }) }
    }
}

impl From<Egress> for Vec<Vec<EgressRule>> {
    fn from(egress: Egress) -> Self {
        egress.layers
    }
}

impl Egress {
    /// A policy of one layer.
    ///
    /// # Errors
    /// When there are more than [`MAX_RULES`].
    pub fn new(rules: Vec<EgressRule>) -> Result<Self, EgressError> {
        vec![rules].try_into()
    }

    /// This policy with one more layer, so at most as permissive.
    ///
    /// # Errors
    /// When there are more than [`MAX_RULES`] in all.
    pub fn narrowed(&self, rules: &[EgressRule]) -> Result<Self, EgressError> {
        let mut layers = self.layers.clone();
        if !layers.iter().any(|layer| layer == rules) {
            layers.push(rules.to_vec());
        }
        layers.try_into()
    }

    /// This policy with `rules` in place of all layers after the first `kept`.
    ///
    /// # Errors
    /// When there are more than [`MAX_RULES`] in all.
    pub fn replaced(&self, kept: usize, rules: &[EgressRule]) -> Result<Self, EgressError> {
        let layers = self.layers.iter().take(kept).cloned().collect();
        Self { layers }.narrowed(rules)
    }

    /// Whether everything passes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Its layers.
    #[must_use]
    pub fn layers(&self) -> &[Vec<EgressRule>] {
        &self.layers
    }
}

/// A policy, with the number of decisions of each of its rules.
#[derive(Debug)]
pub(super) struct Filter {
    policy: Egress,
    hits: Vec<Vec<u64>>,
}

/// The judgement of one packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    pub(super) passes: bool,
    /// The deciding rule of each layer that was consulted.
    by: Vec<Option<usize>>,
}

impl Judgement {
    /// The judgement of a packet that needs no rule.
    pub(super) fn open() -> Self {
        Self { passes: true, by: Vec::new() }
    }

    /// The judgement of a packet that cannot be parsed.
    pub(super) fn refused() -> Self {
        Self { passes: false, by: Vec::new() }
    }
}

impl Filter {
    pub(super) fn new(policy: Egress) -> Self {
        let hits = policy.layers.iter().map(|layer| vec![0; layer.len()]).collect();
        Self { policy, hits }
    }

    pub(super) fn policy(&self) -> &Egress {
        &self.policy
    }

    /// The counts, in the order of the policy's rules.
    pub(super) fn hits(&self) -> &[Vec<u64>] {
        &self.hits
    }

    /// Judges a packet of `len` bytes with its virtio header. `headers` is the whole packet, or its
    /// first [`MAX_HEADERS`] bytes. `mac` is the guest's address.
    pub(super) fn judge(&self, headers: &[u8], len: usize, mac: Mac) -> Judgement {
        let mut judgement = Judgement::refused();
        let packet = match parse(headers, len, mac) {
            Ok(ParsedPacket::Neighbours) => return Judgement::open(),
            Ok(ParsedPacket::Ip(packet)) => packet,
            Err(refused) => {
                tracing::trace!(%refused, "a packet is dropped");
                return judgement;
            }
        };
        for layer in &self.policy.layers {
            let decided = layer.iter().enumerate().find_map(|(at, rule)| match rule.decide(&packet) {
                Decision::Next => None,
                Decision::Is(verdict) => Some((at, verdict)),
            });
            judgement.by.push(decided.map(|(at, _)| at));
            let verdict = decided.map_or_else(|| default_of(layer), |(_, verdict)| verdict);
            if verdict == Verdict::Deny {
                return judgement;
            }
        }
        judgement.passes = true;
        judgement
    }

    /// Counts the decisions of the rules.
    pub(super) fn count(&mut self, judgement: &Judgement) {
        for (layer, by) in self.hits.iter_mut().zip(&judgement.by) {
            if let Some(hits) = by.and_then(|at| layer.get_mut(at)) {
                *hits += 1;
            }
        }
    }
}

/// A layer's verdict on a packet that matches none of its rules.
fn default_of(layer: &[EgressRule]) -> Verdict {
    if layer.iter().any(EgressRule::allows) { Verdict::Deny } else { Verdict::Allow }
}
