//! The files of an image, in memory. Content of files is in one unnamed spool file: names in an
//! image are never used as names on this host.

mod apply;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeMap;

use thiserror::Error;

use crate::limits::{ImageLimits, LimitError, MAX_LINK_STEPS};
use crate::tar::{TarError, Xattr};

pub(crate) use apply::{Layer, Spool};

/// Why a layer is refused. Each variant names the entry.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The archive is refused.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The layer exceeds a limit.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A path contains `..`.
    #[error("{0} leads out of the image")]
    Traversal(String),
    /// A path is empty, or contains a NUL.
    #[error("invalid file name {0}")]
    Name(String),
    /// A path, a name or the target of a link is too long, or too deep.
    #[error("{path}: its {what} is longer than {limit}")]
    TooLong {
        /// The entry's path.
        path: String,
        /// The item.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A whiteout without a valid name.
    #[error("invalid whiteout entry {0}")]
    Whiteout(String),
    /// A second entry of the same name in one layer.
    #[error("{0} is twice in its layer")]
    Duplicate(String),
    /// A component of the path is a file.
    #[error("{path}: {part} is not a directory")]
    NotADirectory {
        /// The entry's path.
        path: String,
        /// The component.
        part: String,
    },
    /// Symbolic links form a cycle.
    #[error("{0} leads through too many symbolic links")]
    Loop(String),
    /// A hard link to a missing file, or to a directory.
    #[error("{path} is a hard link to {target}, which is not a file of the image")]
    HardLink {
        /// The entry's path.
        path: String,
        /// Its target.
        target: String,
    },
    /// A file has too many hard links.
    #[error("{0} is one hard link too many of its file")]
    Links(String),
    /// Attributes are too large.
    #[error("{path} has {found} bytes of extended attributes; {limit} are allowed")]
    Xattrs {
        /// The entry's path.
        path: String,
        /// Their size.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The spool file fails.
    #[error("the content of {path} cannot be kept")]
    Spool {
        /// The entry's path.
        path: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// A node of a tree.
pub(crate) type NodeId = usize;
/// The root node.
pub(crate) const ROOT: NodeId = 0;

/// The owner and the other metadata of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: i64,
    /// Sorted by name.
    pub(crate) xattrs: Vec<Xattr>,
}

impl Meta {
    /// For a directory without an entry of its own.
    fn implied() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirent {
    pub(crate) node: NodeId,
    /// The layer that added it.
    layer: usize,
}

/// The content of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Dir(BTreeMap<Box<[u8]>, Dirent>),
    /// A range of the spool.
    File {
        offset: u64,
        size: u64,
    },
    Symlink(Box<[u8]>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// A file, a directory or another node of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) content: Content,
    /// Number of its names.
    pub(crate) links: u32,
}

/// All files of an image.
#[derive(Debug)]
pub(crate) struct Tree {
    /// None for a removed node.
    nodes: Vec<Option<Node>>,
    free: Vec<NodeId>,
    /// Most nodes below the root. Entries alone are no bound: one may imply many directories.
    entries: u64,
    /// Components of links that may still be followed: else a small layer of long links takes hours.
    link_steps: u64,
}

impl Tree {
    /// A tree that consists of the root, for an image of these limits.
    pub(crate) fn new(limits: &ImageLimits) -> Self {
        let root = Node { meta: Meta::implied(), content: Content::Dir(BTreeMap::new()), links: 1 };
        Self { nodes: vec![Some(root)], free: Vec::new(), entries: limits.entries, link_steps: MAX_LINK_STEPS }
    }

    /// The node of a name.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        self.nodes[id].as_ref().unwrap_or_else(|| unreachable!("node {id} has a name and is not there"))
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id].as_mut().unwrap_or_else(|| unreachable!("node {id} has a name and is not there"))
    }

    /// The names in a directory. None for other nodes.
    pub(crate) fn names(&self, id: NodeId) -> Option<&BTreeMap<Box<[u8]>, Dirent>> {
        match &self.node(id).content {
            Content::Dir(names) => Some(names),
            _ => None,
        }
    }

    fn names_mut(&mut self, id: NodeId) -> Option<&mut BTreeMap<Box<[u8]>, Dirent>> {
        match &mut self.node_mut(id).content {
            Content::Dir(names) => Some(names),
            _ => None,
        }
    }

    fn add(&mut self, node: Node) -> Result<NodeId, LimitError> {
        match self.free.pop() {
            Some(id) => {
                self.nodes[id] = Some(node);
                Ok(id)
            }
            None if self.nodes.len() as u64 > self.entries => Err(LimitError::Entries(self.entries)),
            None => {
                self.nodes.push(Some(node));
                Ok(self.nodes.len() - 1)
            }
        }
    }

    /// Removes a name from a node, and everything below the node if that was its last.
    fn unlink(&mut self, id: NodeId) {
        let mut left = vec![id];
        while let Some(id) = left.pop() {
            let node = self.node_mut(id);
            node.links -= 1;
            if node.links == 0 {
                let node = self.nodes[id].take();
                self.free.push(id);
                if let Some(Node { content: Content::Dir(names), .. }) = node {
                    left.extend(names.values().map(|name| name.node));
                }
            }
        }
    }
}
