//! Applies a layer to a tree. Whiteouts hide entries of lower layers, at any position in the
//! archive. So all headers are read first, then whiteouts are applied, and then entries in their
//! order.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};

use super::walk::parts;
use super::{Content, Dirent, LayerError, Meta, Node, NodeId, ROOT, Tree};
use crate::limits::{Bounded, MAX_LINKS, MAX_PATH, XATTR_COST};
use crate::sparse::SparseWriter;
use crate::tar::{TarHeader, TarKind, TarReader, shown};
use crate::xattr_rules::{XATTR_ROOM, xattr_index, xattr_room};

const WHITEOUT: &[u8] = b".wh.";
/// Hides all entries of the lower layers in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of other files of AUFS, which only AUFS uses.
const AUFS: &[u8] = b".wh..wh.";
const CHUNK: usize = 128 << 10;

/// The content of files, one after the other.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    end: u64,
}

impl Spool {
    pub(crate) fn new(file: File) -> Self {
        Self { file, end: 0 }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    fn take<R: Read>(&mut self, header: &TarHeader, archive: &mut TarReader<R>) -> Result<Content, LayerError> {
        let offset = self.end;
        let failed = |source| LayerError::Spool { path: shown(&header.path), source };
        let mut writer = SparseWriter::new(&self.file, offset);
        let mut chunk = vec![0; CHUNK.min(usize::try_from(header.size).unwrap_or(CHUNK)).max(1)];
        loop {
            let read = archive.read_content(&mut chunk)?;
            if read == 0 {
                break;
            }
            writer.write_all(&chunk[..read]).map_err(failed)?;
            self.end = writer.position();
        }
        writer.finish().map_err(failed)?;
        Ok(Content::File { offset, size: self.end - offset })
    }
}

/// A layer that has been read.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    /// Paths of hidden entries.
    whiteouts: Vec<Vec<u8>>,
    /// Paths of directories whose lower entries are all hidden.
    opaque: Vec<Vec<u8>>,
    entries: Vec<(TarHeader, Option<Content>)>,
    /// Number of attributes left out, and of files of AUFS.
    pub(crate) skipped: u64,
}

impl Layer {
    /// Reads an archive to its end. Returns the stream after the archive too, to be read further.
    pub(crate) fn read<'a, R: Read>(
        archive: Bounded<'a, R>,
        spool: &mut Spool,
    ) -> Result<(Self, Bounded<'a, R>), LayerError> {
        let mut archive = TarReader::new(archive);
        let mut layer = Self::default();
        while let Some(header) = archive.next_entry()? {
            let xattrs: usize = header.xattrs.iter().map(|(name, value)| XATTR_COST + name.len() + value.len()).sum();
            let budget = archive.get_mut().budget();
            budget.take_entry(header.path.len() + header.link.len() + xattrs)?;
            budget.allows(header.size)?;
            layer.take(header, spool, &mut archive)?;
        }
        Ok((layer, archive.into_inner()))
    }

    /// A layer of headers with empty files.
    #[cfg(test)]
    pub(super) fn of<R: Read>(
        headers: impl Iterator<Item = TarHeader>,
        spool: &mut Spool,
        archive: &mut TarReader<R>,
    ) -> Result<Self, LayerError> {
        let mut layer = Self::default();
        for header in headers {
            layer.take(header, spool, archive)?;
        }
        Ok(layer)
    }

    fn take<R: Read>(
        &mut self,
        mut header: TarHeader,
        spool: &mut Spool,
        archive: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let named = parts(&header.path)?;
        let (name, above) = named.split_last().map_or((&b""[..], &[][..]), |(name, above)| (*name, above));
        if above.iter().any(|part| part.starts_with(AUFS)) || name.starts_with(AUFS) && name != OPAQUE {
            self.skipped += 1;
            return Ok(());
        }
        if above.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(LayerError::Whiteout(shown(&header.path)));
        }
        if name == OPAQUE {
            self.opaque.push(join(above));
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(LayerError::Whiteout(shown(&header.path)));
            }
            self.whiteouts.push(join(&[above, &[hidden]].concat()));
            return Ok(());
        }
        self.check_link(&header)?;
        self.skipped += sort_xattrs(&mut header)?;
        let content = match header.kind {
            TarKind::File => Some(spool.take(&header, archive)?),
            _ => None,
        };
        self.entries.push((header, content));
        Ok(())
    }

    fn check_link(&self, header: &TarHeader) -> Result<(), LayerError> {
        match header.kind {
            TarKind::Symlink if header.link.is_empty() || header.link.contains(&0) => {
                Err(LayerError::Name(shown(&header.link)))
            }
            TarKind::Symlink if header.link.len() >= MAX_PATH => {
                Err(LayerError::TooLong { path: shown(&header.path), what: "target", limit: MAX_PATH - 1 })
            }
            TarKind::HardLink => parts(&header.link).map(drop),
            _ => Ok(()),
        }
    }
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&b'/')
}

/// Keeps the image's own attributes: those of users, and the capabilities of programs. The others
/// belong to the system on which the layer was made. Returns the number of these.
pub(super) fn sort_xattrs(header: &mut TarHeader) -> Result<u64, LayerError> {
    let before = header.xattrs.len();
    header.xattrs.retain(|(name, _)| xattr_index(name).is_some());
    // The layer keeps the list.
    header.xattrs.shrink_to_fit();
    header.xattrs.sort();
    let found: usize = header.xattrs.iter().map(|(name, value)| xattr_room(name, value)).sum();
    if found > XATTR_ROOM || header.xattrs.iter().any(|(name, _)| name.len() > 255 || name.contains(&0)) {
        return Err(LayerError::Xattrs { path: shown(&header.path), found, limit: XATTR_ROOM });
    }
    Ok((before - header.xattrs.len()) as u64)
}

impl Tree {
    /// Applies a layer to the tree. `number` must be unique per layer.
    pub(crate) fn apply(&mut self, layer: Layer, number: usize) -> Result<(), LayerError> {
        let replaced = self.replaced_links(&layer);
        // Before anything is hidden, as the links themselves may be.
        let is_old = |path: &&Vec<u8>| self.first_link(path).is_none_or(|link| !replaced.contains(link));
        let opaque: Vec<&Vec<u8>> = layer.opaque.iter().filter(is_old).collect();
        let whiteouts: Vec<&Vec<u8>> = layer.whiteouts.iter().filter(is_old).collect();
        for path in opaque {
            if let Some(dir) = self.opaque(path)? {
                let names = self.names_mut(dir).map(std::mem::take).unwrap_or_default();
                names.values().for_each(|name| self.unlink(name.node));
            }
        }
        for path in whiteouts {
            let whole = split(path);
            let Some((name, above)) = whole.split_last() else { continue };
            if let Some(dir) = self.directory(path, above, None)?
                && let Some(hidden) = self.names_mut(dir).and_then(|names| names.remove(*name))
            {
                self.unlink(hidden.node);
            }
        }
        layer.entries.into_iter().try_for_each(|(header, content)| self.put(header, content, number))
    }

    /// Links of lower layers in the place of which this layer has something else, as far as whiteouts are beneath them:
    /// these are of the new directory, and hide nothing behind the link.
    fn replaced_links<'l>(&self, layer: &'l Layer) -> HashSet<&'l [u8]> {
        let hidden = layer.opaque.iter().chain(&layer.whiteouts);
        let mut links: HashSet<&[u8]> = hidden.filter_map(|path| self.first_link(path)).collect();
        if !links.is_empty() {
            let new = layer.entries.iter().filter(|(header, _)| header.kind != TarKind::Symlink);
            let new: HashSet<Vec<u8>> = new.map(|(header, _)| join(&parts(&header.path).unwrap_or_default())).collect();
            links.retain(|path| new.contains(*path));
        }
        links
    }

    /// The path up to the first symbolic link above its last component, if it leads over one. The walk ends where nothing
    /// is: an image may have a million long paths.
    fn first_link<'p>(&self, path: &'p [u8]) -> Option<&'p [u8]> {
        let (mut dir, mut from) = (ROOT, 0);
        for (at, _) in path.iter().enumerate().filter(|(_, byte)| **byte == b'/') {
            dir = self.names(dir)?.get(&path[from..at])?.node;
            if matches!(self.node(dir).content, Content::Symlink(_)) {
                return Some(&path[..at]);
            }
            from = at + 1;
        }
        None
    }

    /// The directory of the lower layers that an opaque one hides. A symbolic link as the last component is
    /// not followed: the new directory is in the link's place.
    fn opaque(&mut self, path: &[u8]) -> Result<Option<NodeId>, LayerError> {
        let whole = split(path);
        let Some((name, above)) = whole.split_last() else { return Ok(Some(ROOT)) };
        let Some(dir) = self.directory(path, above, None)? else { return Ok(None) };
        let hidden = self.names(dir).and_then(|names| names.get(*name)).map(|hidden| hidden.node);
        Ok(hidden.filter(|hidden| self.names(*hidden).is_some()))
    }

    fn put(&mut self, header: TarHeader, content: Option<Content>, layer: usize) -> Result<(), LayerError> {
        let path = header.path.clone();
        let named = parts(&path)?;
        let meta = |xattrs| Meta { mode: header.mode, uid: header.uid, gid: header.gid, mtime: header.mtime, xattrs };
        let Some((name, above)) = named.split_last() else {
            // An entry for the root itself.
            if header.kind != TarKind::Dir {
                return Err(LayerError::NotADirectory { path: shown(&path), part: shown(b"/") });
            }
            self.node_mut(ROOT).meta = meta(header.xattrs);
            return Ok(());
        };
        let Some(dir) = self.directory(&path, above, Some(layer))? else {
            return Err(LayerError::Name(shown(&path)));
        };
        let there = self.names(dir).and_then(|names| names.get(*name)).copied();
        let there_is_dir = there.is_some_and(|there| self.names(there.node).is_some());
        if let Some(there) = there {
            if there_is_dir && header.kind == TarKind::Dir {
                self.node_mut(there.node).meta = meta(header.xattrs);
                self.enter(dir, name, Dirent { layer, ..there });
                return Ok(());
            }
            if there.layer == layer {
                return Err(LayerError::Duplicate(shown(&path)));
            }
        }
        let node = match header.kind {
            TarKind::HardLink => {
                let target = self.link_target(&header)?;
                // Before the replaced node is removed, which may be the target or contain it.
                self.node_mut(target).links += 1;
                target
            }
            _ => {
                let content = content.unwrap_or_else(|| other_content(&header));
                self.add(Node { meta: meta(header.xattrs), content, links: 1 })?
            }
        };
        self.enter(dir, name, Dirent { node, layer });
        if let Some(there) = there {
            self.unlink(there.node);
        }
        Ok(())
    }

    fn enter(&mut self, dir: NodeId, name: &[u8], entry: Dirent) {
        if let Some(names) = self.names_mut(dir) {
            names.insert(name.into(), entry);
        }
    }

    /// The file that a hard link refers to. A symbolic link as the last component is not followed.
    fn link_target(&mut self, header: &TarHeader) -> Result<NodeId, LayerError> {
        let missing = || LayerError::HardLink { path: shown(&header.path), target: shown(&header.link) };
        let named = parts(&header.link)?;
        let (name, above) = named.split_last().ok_or_else(missing)?;
        let dir = self.directory(&header.link, above, None)?.ok_or_else(missing)?;
        let target = self.names(dir).and_then(|names| names.get(*name)).ok_or_else(missing)?.node;
        match self.node(target) {
            Node { content: Content::Dir(_), .. } => Err(missing()),
            Node { links, .. } if *links >= MAX_LINKS => Err(LayerError::Links(shown(&header.path))),
            _ => Ok(target),
        }
    }
}

/// The components of a path that has been checked.
fn split(path: &[u8]) -> Vec<&[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect()
}

fn other_content(header: &TarHeader) -> Content {
    match header.kind {
        TarKind::Dir => Content::Dir(BTreeMap::new()),
        TarKind::Symlink => Content::Symlink(header.link.as_slice().into()),
        TarKind::Char(major, minor) => Content::Char(major, minor),
        TarKind::Block(major, minor) => Content::Block(major, minor),
        TarKind::Fifo => Content::Fifo,
        TarKind::File | TarKind::HardLink => Content::File { offset: 0, size: 0 },
    }
}
