//! Egress rules: to which addresses and ports a guest may send.
//!
//! The device judges a copy of each packet, which the guest cannot change any more, and sends that
//! copy. A packet that is not understood is dropped.
//!
//! A policy is a list of layers, each a list of rules. In a layer the first rule that matches
//! decides. Without a match the layer drops the packet if it allows anything, and passes it
//! otherwise. A packet has to pass every layer, so a layer that is added can only narrow.

mod frame;
mod rule;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::mac::Mac;
pub(super) use frame::MAX_HEADERS;
use frame::{Packet, parse};
use rule::{Decision, Verdict};
pub use rule::{EgressError, EgressRule};

/// Most rules of a policy, in all of its layers.
pub const MAX_RULES: usize = 256;

/// To which addresses and ports a guest may send. Without rules: to all.
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

    /// This policy with one more layer. It allows nothing that this one does not.
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

    /// This policy with `rules` in the place of all layers but the first `kept`.
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

/// A policy and how often each of its rules has decided.
#[derive(Debug)]
pub(super) struct Filter {
    policy: Egress,
    hits: Vec<Vec<u64>>,
}

/// The judgement of one packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    pub(super) passes: bool,
    /// Of each layer that was asked, the rule that decided.
    by: Vec<Option<usize>>,
}

impl Judgement {
    /// Of a packet that no rule is asked about.
    pub(super) fn open() -> Self {
        Self { passes: true, by: Vec::new() }
    }

    /// Of a packet that is not understood.
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

    /// Judges a packet of `len` bytes with its virtio header, which begins with `headers`: the
    /// whole packet, or its first [`MAX_HEADERS`] bytes. `mac` is the guest's address.
    pub(super) fn judge(&self, headers: &[u8], len: usize, mac: Mac) -> Judgement {
        let mut judgement = Judgement::refused();
        let packet = match parse(headers, len, mac) {
            Ok(Packet::Neighbours) => return Judgement::open(),
            Ok(Packet::Ip(packet)) => packet,
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

    /// Counts the rules that have decided.
    pub(super) fn count(&mut self, judgement: &Judgement) {
        for (layer, by) in self.hits.iter_mut().zip(&judgement.by) {
            if let Some(hits) = by.and_then(|at| layer.get_mut(at)) {
                *hits += 1;
            }
        }
    }
}

/// What a layer does with a packet that none of its rules matches.
fn default_of(layer: &[EgressRule]) -> Verdict {
    if layer.iter().any(EgressRule::allows) { Verdict::Deny } else { Verdict::Allow }
}
