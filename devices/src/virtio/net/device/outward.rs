//! Egress rules of a network device: its packets are judged before they are sent.

use std::sync::Arc;

use clade_host_io::{AlignedBuf, Fragment};
use vm_memory::Bytes;

use super::{MAX_PACKET, Net};
use crate::virtio::net::egress::{Egress, EgressRule, Filter, Judgement, MAX_HEADERS};

/// Memory for the packet to be judged; None without rules.
pub(super) fn copy_for(egress: &Egress) -> Option<Arc<AlignedBuf>> {
    (!egress.is_empty()).then(|| Arc::new(AlignedBuf::new(MAX_PACKET)))
}

impl Net {
    /// The addresses that the guest may send to.
    #[must_use]
    pub fn egress(&self) -> &Egress {
        self.filter.policy()
    }

    /// Number of packets decided by each rule, by the policy's layers.
    #[must_use]
    pub fn egress_packets(&self) -> Vec<Vec<(EgressRule, u64)>> {
        let layers = self.filter.policy().layers().iter().zip(self.filter.hits());
        layers.map(|(rules, hits)| rules.iter().cloned().zip(hits.iter().copied()).collect()).collect()
    }

    /// Number of layers of the policy, from the first on, that came with its saved state, so from
    /// its parent. The later layers are its own.
    #[must_use]
    pub fn inherited_egress(&self) -> usize {
        self.inherited
    }

    /// Replaces the egress rules, from the next packet on. Counts begin at zero.
    pub fn set_egress(&mut self, egress: Egress) {
        let same = |(old, new): &(&Vec<EgressRule>, &Vec<EgressRule>)| old == new;
        let kept = self.egress().layers().iter().zip(egress.layers()).take_while(same).count();
        self.inherited = self.inherited.min(kept);
        self.copy = copy_for(&egress);
        self.filter = Filter::new(egress);
    }

    /// Judges the packet in `memory`, of `len` bytes. With rules, the returned memory is a copy,
    /// because the guest can change its own between the judgement and the sending.
    pub(super) fn judged(&self, memory: Vec<Fragment>, len: usize) -> (Vec<Fragment>, Judgement) {
        let Some(copy) = &self.copy else { return (memory, Judgement::open()) };
        let mut headers = [0; MAX_HEADERS];
        let headers = &mut headers[..len.min(MAX_HEADERS)];
        match copied(copy, &memory, len, headers) {
            Some(whole) => (vec![whole], self.filter.judge(headers, len, self.mac)),
            None => (memory, Judgement::refused()),
        }
    }
}

/// Copies a packet of `len` bytes, and its first bytes from the copy into `headers`. None if they
/// do not fit, which does not happen for packets of a driver.
fn copied(copy: &Arc<AlignedBuf>, memory: &[Fragment], len: usize, headers: &mut [u8]) -> Option<Fragment> {
    let whole = Fragment::owned(copy, 0, len).ok()?;
    let mut at = 0;
    for part in memory {
        part.slice().copy_to_volatile_slice(whole.part(at, part.len()).slice());
        at += part.len();
    }
    whole.slice().read_slice(headers, 0).ok()?;
    (at == len).then_some(whole)
}
