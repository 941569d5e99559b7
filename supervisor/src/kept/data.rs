//! The data of kept checkpoints: which checkpoints need it.
//!
//! The data of a checkpoint is a snapshot. An incremental one needs the data of the checkpoints that it
//! builds on, also when their names are removed. So data has a name of its own, and is removed once no
//! checkpoint needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::{Deserialize, Serialize};

use clade_api::random_hex;

/// Digits of the name of data.
const DIGITS: usize = 32;

/// The name of a checkpoint's data: hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct DataId(String);

impl DataId {
    pub(super) fn random() -> io::Result<Self> {
        Ok(Self(random_hex::<{ DIGITS / 2 }>()?))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DataId {
    type Error = &'static str;

    /// # Errors
    /// When it is not a name of data: a path would lead elsewhere.
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let is_valid = text.len() == DIGITS && text.bytes().all(is_hex);
        if is_valid { Ok(Self(text)) } else { Err("a name of data has 32 hexadecimal digits") }
    }
}

impl From<DataId> for String {
    fn from(id: DataId) -> Self {
        id.0
    }
}

/// The data that checkpoints need: of those on disk, and of those being written.
#[derive(Debug, Default)]
pub(super) struct Needs {
    /// By a checkpoint's name: its own data, and then the data that it builds on, the nearest first.
    chains: BTreeMap<String, Vec<DataId>>,
    /// Data made since the start: an unreadable record is older than that.
    own: BTreeSet<DataId>,
    /// Whether all records were read. Until then, any data from before the start may be needed.
    are_complete: bool,
}

impl Needs {
    fn insert(&mut self, name: &str, chain: &[DataId]) {
        self.chains.insert(name.to_owned(), chain.to_vec());
    }

    /// Notes the checkpoints that are there at the start. `are_all`: no record was unreadable.
    pub(super) fn found<'a>(&mut self, records: impl IntoIterator<Item = (&'a str, &'a [DataId])>, are_all: bool) {
        records.into_iter().for_each(|(name, chain)| self.insert(name, chain));
        self.are_complete = are_all;
    }

    /// Adds a checkpoint with data of its own that builds on `base`, the nearest first. Without the data
    /// of `base`, it builds on nothing. Returns its chain.
    pub(super) fn add(&mut self, name: &str, own: DataId, base: &[DataId]) -> Vec<DataId> {
        let is_there = base.first().is_some_and(|nearest| self.chains.values().any(|chain| chain.contains(nearest)));
        self.own.insert(own.clone());
        let chain: Vec<DataId> = [own].into_iter().chain(base.iter().filter(|_| is_there).cloned()).collect();
        self.insert(name, &chain);
        chain
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.chains.remove(name);
    }

    /// Forgets data that is removed.
    pub(super) fn forget(&mut self, gone: &[DataId]) {
        self.own.retain(|id| !gone.contains(id));
    }

    /// Returns the data among `there` that no checkpoint needs.
    pub(super) fn unneeded(&self, there: impl Iterator<Item = DataId>) -> Vec<DataId> {
        let needed: BTreeSet<&DataId> = self.chains.values().flatten().collect();
        let (may_go, stays): (Vec<_>, Vec<_>) =
            there.filter(|id| !needed.contains(id)).partition(|id| self.are_complete || self.own.contains(id));
        if !stays.is_empty() {
            tracing::warn!(count = stays.len(), "data of checkpoints stays, because an unreadable record may need it");
        }
        may_go
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_data_are_hexadecimal_digits() {
        let id = DataId::random().unwrap();
        let text = serde_json::to_string(&id).unwrap();
        assert_eq!(serde_json::from_str::<DataId>(&text).unwrap(), id);
        assert!(DataId::random().unwrap() != id);
        let short = "0".repeat(31);
        let wrong = [String::new(), "../../../../../../../../etc/passwd".to_owned(), short, "A".repeat(32)];
        for text in wrong {
            assert!(DataId::try_from(text.clone()).is_err(), "{text}");
        }
    }

    #[test]
    fn data_is_needed_until_the_last_checkpoint_on_it_goes() {
        let ids: Vec<DataId> = (0..4).map(|_| DataId::random().unwrap()).collect();
        let mut needs = Needs::default();
        needs.found([], true);
        let unneeded = |needs: &Needs| {
            let unneeded = needs.unneeded(ids.iter().cloned());
            ids.iter().enumerate().filter(|(_, id)| unneeded.contains(id)).map(|(at, _)| at).collect::<Vec<_>>()
        };
        let a = needs.add("a", ids[0].clone(), &[]);
        let b = needs.add("b", ids[1].clone(), &a);
        assert_eq!(b, ids[..2].iter().rev().cloned().collect::<Vec<_>>());
        let c = needs.add("c", ids[2].clone(), &b);
        assert_eq!(unneeded(&needs), [3]);
        needs.remove("a");
        needs.remove("b");
        assert_eq!(unneeded(&needs), [3], "another checkpoint builds on both");
        // On data whose checkpoint is removed, but not the data.
        let d = needs.add("d", ids[3].clone(), &b);
        assert_eq!(d.len(), 3);
        needs.remove("c");
        assert_eq!(unneeded(&needs), [2]);
        assert_eq!(needs.add("e", ids[2].clone(), &[DataId::random().unwrap()]).len(), 1, "the base has gone");
        needs.remove("d");
        assert_eq!(unneeded(&needs), [0, 1, 3]);
        assert_eq!(c.len(), 3);
        // Before the records are read, and beside an unreadable one, data of the time before stays.
        let mut needs = Needs::default();
        assert!(unneeded(&needs).is_empty());
        needs.add("new", ids[0].clone(), &[]);
        needs.remove("new");
        assert_eq!(unneeded(&needs), [0]);
        needs.found([("old", &ids[1..2])], false);
        assert_eq!(unneeded(&needs), [0]);
        needs.found([], true);
        assert_eq!(unneeded(&needs), [0, 2, 3]);
        needs.forget(&ids[..1]);
        assert!(needs.own.is_empty());
    }
}
