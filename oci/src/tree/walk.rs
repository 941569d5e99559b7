//! Paths within a tree. Symbolic links are followed as in a chroot to the root.

use std::collections::{BTreeMap, VecDeque};

use super::{Content, Dirent, LayerError, Meta, Node, NodeId, ROOT, Tree};
use crate::limits::{LimitError, MAX_DEPTH, MAX_LINK_STEPS, MAX_NAME, MAX_PATH};
use crate::tar::shown;

/// Maximum number of symbolic links in a path, as in the kernel.
const MAX_LINKS_FOLLOWED: usize = 40;

/// The components of an entry's path, from the root of the image on: also of an absolute path, which some
/// tools write. Empty for the root itself.
pub(super) fn parts(path: &[u8]) -> Result<Vec<&[u8]>, LayerError> {
    let too_long = |what, limit| LayerError::TooLong { path: shown(path), what, limit };
    if path.is_empty() || path.contains(&0) {
        return Err(LayerError::Name(shown(path)));
    }
    if path.len() > MAX_PATH {
        return Err(too_long("path", MAX_PATH));
    }
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&&b".."[..]) {
        return Err(LayerError::Traversal(shown(path)));
    }
    if parts.iter().any(|part| part.len() > MAX_NAME) {
        return Err(too_long("name", MAX_NAME));
    }
    Ok(parts)
}

impl Tree {
    /// The directory of the given components. With a `layer`, missing directories are made in it;
    /// without one, a missing directory yields None.
    pub(super) fn directory(
        &mut self,
        path: &[u8],
        parts: &[&[u8]],
        layer: Option<usize>,
    ) -> Result<Option<NodeId>, LayerError> {
        let mut todo: VecDeque<Box<[u8]>> = parts.iter().map(|part| Box::from(*part)).collect();
        let (mut way, mut followed) = (vec![ROOT], 0);
        while let Some(part) = todo.pop_front() {
            if &*part == b".." {
                // The parent of the root is the root.
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            if part.len() > MAX_NAME {
                return Err(LayerError::TooLong { path: shown(path), what: "name", limit: MAX_NAME });
            }
            let here = way[way.len() - 1];
            let there = self.names(here).and_then(|names| names.get(&part)).map(|name| name.node);
            let next = match there {
                Some(id) => id,
                None => match layer {
                    Some(layer) => self.make_directory(here, &part, layer)?,
                    None => return Ok(None),
                },
            };
            match &self.node(next).content {
                Content::Dir(_) => {
                    way.push(next);
                    if way.len() > MAX_DEPTH {
                        return Err(LayerError::TooLong { path: shown(path), what: "way", limit: MAX_DEPTH });
                    }
                }
                Content::Symlink(target) => {
                    followed += 1;
                    if followed > MAX_LINKS_FOLLOWED {
                        return Err(LayerError::Loop(shown(path)));
                    }
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    // All components, also those that are skipped: each costs time.
                    let count = 1 + target.iter().filter(|byte| **byte == b'/').count() as u64;
                    let left = self.link_steps.checked_sub(count).ok_or(LimitError::LinkSteps(MAX_LINK_STEPS))?;
                    let steps = target.split(|byte| *byte == b'/');
                    for step in steps.rev().filter(|step| !step.is_empty() && *step != b".") {
                        todo.push_front(step.into());
                    }
                    self.link_steps = left;
                }
                _ if layer.is_none() => return Ok(None),
                _ => return Err(LayerError::NotADirectory { path: shown(path), part: shown(&part) }),
            }
        }
        Ok(way.pop())
    }

    fn make_directory(&mut self, parent: NodeId, name: &[u8], layer: usize) -> Result<NodeId, LayerError> {
        let node = self.add(Node { meta: Meta::implied(), content: Content::Dir(BTreeMap::new()), links: 1 })?;
        if let Some(names) = self.names_mut(parent) {
            names.insert(name.into(), Dirent { node, layer });
        }
        Ok(node)
    }
}
