//! The data of kept checkpoints: which checkpoints need it.
//!
//! The data of a checkpoint is a snapshot. An incremental one needs the data of the checkpoints that it
//! builds on, also when their names are removed. So data has a name of its own, and is removed once no
//! checkpoint needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::{Deserialize, Serialize};

use crate::control::random_hex;

/// Digits of the name of data.
const DIGITS: usize = 32;

/// The name of a checkpoint's data: hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(in crate::supervisor) struct DataId(String);

impl DataId {
    pub(super) fn random() -> io::Result<Self> {
        let mut digits = random_hex()?;
        digits.truncate(DIGITS);
        Ok(Self(digits))
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
    /// Whether some records cannot be read: what they need is not known.
    pub(super) are_incomplete: bool,
}

impl Needs {
    pub(super) fn insert(&mut self, name: &str, chain: &[DataId]) {
        self.chains.insert(name.to_owned(), chain.to_vec());
    }

    /// Adds a checkpoint with data of its own that builds on `base`, the nearest first. Without the data
    /// of `base`, it builds on nothing. Returns its chain.
    pub(super) fn add(&mut self, name: &str, own: DataId, base: &[DataId]) -> Vec<DataId> {
        let is_there = base.first().is_some_and(|nearest| self.chains.values().any(|chain| chain.contains(nearest)));
        let chain: Vec<DataId> = [own].into_iter().chain(base.iter().filter(|_| is_there).cloned()).collect();
        self.insert(name, &chain);
        chain
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.chains.remove(name);
    }

    /// Returns the data among `there` that no checkpoint needs. While that is not known, it is none.
    pub(super) fn unneeded(&self, there: impl Iterator<Item = DataId>) -> Vec<DataId> {
        if self.are_incomplete {
            return Vec::new();
        }
        let needed: BTreeSet<&DataId> = self.chains.values().flatten().collect();
        there.filter(|id| !needed.contains(id)).collect()
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
        needs.are_incomplete = true;
        assert!(unneeded(&needs).is_empty(), "an unreadable record may need any");
        assert_eq!(c.len(), 3);
    }
}
