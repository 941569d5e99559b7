//! The files of an image, in memory. Content of files is in one spool without a name: no name that an
//! image has is ever one on this host.

mod apply;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeMap;

use thiserror::Error;

use crate::limits::LimitError;
use crate::tar::{TarError, Xattr};

pub(crate) use apply::{Layer, Spool};

/// Why a layer is refused. Each names the entry.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The archive is refused.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// Beyond a limit.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A path with `..`.
    #[error("{0} leads out of the image")]
    Traversal(String),
    /// An absolute path.
    #[error("{0} is an absolute path")]
    Absolute(String),
    /// A path with a NUL, or an empty one.
    #[error("invalid file name {0}")]
    Name(String),
    /// A path, a name or the target of a link is too long, or too deep.
    #[error("{path}: its {what} is longer than {limit}")]
    TooLong {
        /// Whose.
        path: String,
        /// Which.
        what: &'static str,
        /// How long it may be.
        limit: usize,
    },
    /// A whiteout of nothing that can be named.
    #[error("invalid whiteout entry {0}")]
    Whiteout(String),
    /// A second entry of the same name in one layer.
    #[error("{0} is twice in its layer")]
    Duplicate(String),
    /// A part of the path is a file.
    #[error("{path}: {part} is not a directory")]
    NotADirectory {
        /// Whose.
        path: String,
        /// Which part.
        part: String,
    },
    /// Symbolic links go in circles.
    #[error("{0} leads through too many symbolic links")]
    Loop(String),
    /// A hard link to what is not there, or to a directory.
    #[error("{path} is a hard link to {target}, which is not a file of the image")]
    HardLink {
        /// Whose.
        path: String,
        /// Where it points.
        target: String,
    },
    /// Too many hard links to one file.
    #[error("{0} is one hard link too many of its file")]
    Links(String),
    /// Attributes that do not fit.
    #[error("{path} has {found} bytes of extended attributes; {limit} are allowed")]
    Xattrs {
        /// Whose.
        path: String,
        /// How much they take.
        found: usize,
        /// How much they may take.
        limit: usize,
    },
    /// The spool fails.
    #[error("the content of {path} cannot be kept")]
    Spool {
        /// Whose.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A node of a tree.
pub(crate) type NodeId = usize;
/// The root's.
pub(crate) const ROOT: NodeId = 0;

/// Who a file belongs to, and what else is said of it.
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
    /// Of a directory that no entry describes.
    fn implied() -> Self {
        Self { mode: 0o755, ..Self::default() }
    }
}

/// A name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirent {
    pub(crate) node: NodeId,
    /// The layer that has put it there.
    layer: usize,
}

/// What a node is.
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

/// A file, a directory or what else an image has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) meta: Meta,
    pub(crate) content: Content,
    /// Names that it has.
    pub(crate) links: u32,
}

/// All files of an image.
#[derive(Debug)]
pub(crate) struct Tree {
    /// None where one was removed.
    nodes: Vec<Option<Node>>,
    free: Vec<NodeId>,
}

impl Tree {
    /// One with a root alone.
    pub(crate) fn new() -> Self {
        let root = Node { meta: Meta::implied(), content: Content::Dir(BTreeMap::new()), links: 1 };
        Self { nodes: vec![Some(root)], free: Vec::new() }
    }

    /// A node that a name leads to.
    pub(crate) fn node(&self, id: NodeId) -> &Node {
        self.nodes[id].as_ref().unwrap_or_else(|| unreachable!("node {id} has a name and is not there"))
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.nodes[id].as_mut().unwrap_or_else(|| unreachable!("node {id} has a name and is not there"))
    }

    /// The names of a directory. None of anything else.
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

    fn add(&mut self, node: Node) -> NodeId {
        match self.free.pop() {
            Some(id) => {
                self.nodes[id] = Some(node);
                id
            }
            None => {
                self.nodes.push(Some(node));
                self.nodes.len() - 1
            }
        }
    }

    /// Takes a name away from a node, and all below it if that was its last.
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
