//! Opening: a snapshot and the snapshots it depends on, checked before use.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use clade_memory::{IntervalMap, PAGE_SHIFT, PAGE_SIZE, PageRange, Piece, RamLayout};

use crate::content::PageContent;
use crate::dir::Dir;
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{Damage, Manifest, Sections, SnapshotId, WorkingSet};
use crate::layer::{LayerFile, sealed_sum};
use crate::parents::{KnownDir, ParentDirs, id_of, real_path};
use crate::staging::{MANIFEST, MAX_MANIFEST, STATE, WORKING_SET, layer_name};

/// Maximum number of snapshots in a chain: a full one, and those on top of it. Each adds files to
/// hold open, and pieces to map.
pub(crate) const MAX_DEPTH: usize = 64;
/// Maximum length of a state file in bytes, regardless of the manifest.
pub(crate) const MAX_STATE: u64 = 256 << 20;
/// Maximum length of a working-set file in bytes, regardless of the size of the memory.
const MAX_WORKING_SET: u64 = 256 << 20;

/// The layer of the chain that has a page: 0 is the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageSource {
    Layer(usize),
    Zero,
}

impl Piece for PageSource {
    fn advance(&self, _pages: u64) -> Self {
        *self
    }
    fn continues(&self, _pages: u64, next: &Self) -> bool {
        self == next
    }
}

/// A space in a chain: each page is in exactly one layer, or zeros.
#[derive(Debug)]
pub(crate) struct ChainSpace {
    pub(crate) bytes: u64,
    /// Newest first.
    pub(crate) layers: Vec<LayerFile>,
    pub(crate) map: IntervalMap<PageSource>,
}

impl ChainSpace {
    fn new(layers: Vec<LayerFile>) -> Result<Self, Error> {
        let mut map = IntervalMap::new();
        for (at, layer) in layers.iter().enumerate().rev() {
            for run in &layer.index.runs {
                map.insert(
                    run.range,
                    if run.kind == PageContent::Zero { PageSource::Zero } else { PageSource::Layer(at) },
                );
            }
        }
        // The oldest layer has all of it, so every page has a place.
        let bytes = layers.last().map_or(0, |oldest| oldest.index.bytes);
        if let Some((oldest, page)) = layers.last().and_then(|oldest| Some((oldest, oldest.index.first_missing()?))) {
            return Err(Error::damaged(&oldest.path, Damage::Hole { page }));
        }
        Ok(Self { bytes, layers, map })
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE)
    }
}

/// One directory of a chain.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) dir: Dir,
    pub(crate) manifest: Manifest,
}

#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) files: FileOps,
    /// Newest first.
    pub(crate) members: Vec<Member>,
    pub(crate) sections: Sections,
    pub(crate) memory: ChainSpace,
    pub(crate) disks: Vec<ChainSpace>,
}

/// A snapshot whose manifest, state, indexes and file lengths were checked, and those of its
/// parents. Its data is checked when it is read, or by [`crate::verify`]. Its files are open: it
/// stays as it is if the directory is replaced or removed.
///
/// There is no protection against a data file that is truncated in place. Accesses to lazily
/// restored memory then fail. KVM_RUN and system calls return EFAULT, which stops that one VM with
/// a reason. An access of this process raises SIGBUS, which the VMM handles.
#[derive(Clone, Debug)]
pub struct Snapshot(pub(crate) Arc<Opened>);

pub(crate) fn read_manifest(files: &FileOps, dir: &Dir) -> Result<Manifest, Error> {
    let bytes = files.read_in(dir, MANIFEST, MAX_MANIFEST)?;
    Manifest::decode(&bytes).map_err(|damage| Error::damaged(dir.path().join(MANIFEST), damage))
}

/// The manifests of a chain, newest first.
pub(crate) fn read_chain(files: &FileOps, dir: &Path, parents: &ParentDirs) -> Result<Vec<Member>, Error> {
    let newest = files.dir(dir)?;
    parents.check_newest(&newest)?;
    let manifest = read_manifest(files, &newest)?;
    let mut seen = HashSet::from([manifest.id]);
    let mut members = vec![Member { dir: newest, manifest }];
    while let Some(Member { dir: child, manifest }) = members.last()
        && let Some(parent) = &manifest.parent
    {
        let at = child.path().join(&parent.path);
        let inside =
            |source| Error::Parent { path: child.path().to_owned(), parent: at.clone(), source: Box::new(source) };
        if !seen.insert(parent.id) {
            return Err(Error::Cycle { path: at, id: parent.id });
        }
        if members.len() >= MAX_DEPTH {
            return Err(Error::TooDeep { path: dir.to_owned(), most: MAX_DEPTH });
        }
        // From the child's open directory, even if its path leads elsewhere by now.
        let opened = files.dir_from(child, Path::new(&parent.path)).map_err(inside)?;
        // Messages use the resolved path: a chain of relative ones is hard to read.
        let called = real_path(opened.file()).unwrap_or_else(|| at.clone());
        let opened = opened.called(called);
        // Of the open directory, so that a link exchanged meanwhile changes nothing.
        parents.check(&members[0].dir, &opened).map_err(inside)?;
        let found = read_manifest(files, &opened).map_err(inside)?;
        if found.id != parent.id {
            let wrong = Error::WrongId { path: at.clone(), wanted: parent.id, found: found.id };
            return Err(inside(wrong));
        }
        fits(child.path(), manifest, &found)?;
        members.push(Member { dir: opened, manifest: found });
    }
    Ok(members)
}

/// Checks that a snapshot and its parent are of one VM.
fn fits(path: &Path, child: &Manifest, parent: &Manifest) -> Result<(), Error> {
    let shape = |what: String| Err(Error::Shape { path: path.to_owned(), what });
    let ranges = |of: &Manifest| of.memory.regions.iter().map(|r| (r.guest_address, r.pages)).collect::<Vec<_>>();
    if ranges(child) != ranges(parent) {
        return shape(format!("its memory is {:?}, its parent's {:?}", ranges(child), ranges(parent)));
    }
    let disks = |of: &Manifest| of.disks.iter().map(|d| (d.name.clone(), d.layer.bytes)).collect::<Vec<_>>();
    if disks(child) != disks(parent) {
        return shape(format!("its disks are {:?}, its parent's {:?}", disks(child), disks(parent)));
    }
    Ok(())
}

fn read_state(files: &FileOps, member: &Member) -> Result<Sections, Error> {
    let entry = &member.manifest.state;
    let bytes = files.read_in(&member.dir, STATE, entry.bytes.min(MAX_STATE))?;
    let checked = || {
        if bytes.len() as u64 != entry.bytes {
            let found = bytes.len() as u64;
            return Err(Damage::Length { what: "the state".to_owned(), wanted: entry.bytes, found });
        }
        let sections = Sections::decode(&bytes)?;
        let (wanted, found) = (entry.checksum, sealed_sum(&bytes));
        if wanted != found {
            return Err(Damage::Checksum { what: "the state".to_owned(), wanted, found });
        }
        Ok(sections)
    };
    checked().map_err(|damage| Error::damaged(member.dir.path().join(STATE), damage))
}

/// The directories of a chain without links. They are the open ones, even if a path has changed since.
fn known_dirs(members: &[Member]) -> Result<Vec<KnownDir>, Error> {
    let known = |member: &Member| {
        let gone = || Error::file("found", member.dir.path(), std::io::ErrorKind::NotFound.into());
        let path = real_path(member.dir.file()).filter(|path| path.is_dir()).ok_or_else(gone)?;
        Ok(KnownDir { path, id: Some(id_of(member.dir.file())?) })
    };
    members.iter().map(known).collect()
}

/// The description of a snapshot's VM, and where the snapshot is. The indexes of its data, which may take much memory,
/// are neither read nor checked.
#[derive(Debug)]
pub struct Description {
    /// The snapshot's identity.
    pub id: SnapshotId,
    /// The state.
    pub sections: Sections,
    /// The directories of the snapshot and of those that it depends on, newest first.
    pub dirs: Vec<KnownDir>,
}

impl Description {
    /// Reads the description in `dir`, and the manifests of the snapshots it depends on, which must be in `parents`.
    ///
    /// # Errors
    /// As for [`Snapshot::open`], as far as these files are concerned. When a directory was removed, or replaced by
    /// another snapshot meanwhile.
    pub fn read(dir: &Path, parents: &ParentDirs) -> Result<Self, Error> {
        let files = FileOps::default();
        let members = read_chain(&files, dir, parents)?;
        let sections = read_state(&files, &members[0])?;
        Ok(Self { id: members[0].manifest.id, sections, dirs: known_dirs(&members)? })
    }
}

impl Snapshot {
    /// Opens the snapshot in `dir` and those it depends on, which must be in `parents`.
    ///
    /// # Errors
    /// When one of them is missing, damaged, of a later format, not the one expected, or in a
    /// directory that is not allowed.
    pub fn open(dir: &Path, parents: &ParentDirs) -> Result<Self, Error> {
        Self::with(&FileOps::default(), dir, parents)
    }

    pub(crate) fn with(files: &FileOps, dir: &Path, parents: &ParentDirs) -> Result<Self, Error> {
        let members = read_chain(files, dir, parents)?;
        let newest = &members[0];
        let sections = read_state(files, newest)?;
        // A restore does not need the parents' states. The check exists because a chain must be
        // complete.
        members[1..].iter().try_for_each(|member| read_state(files, member).map(drop))?;
        let space = |disk: Option<usize>| {
            let layers = members.iter().map(|member| {
                let entry = disk.map_or(&member.manifest.memory.layer, |at| &member.manifest.disks[at].layer);
                LayerFile::open(files, &member.dir, &layer_name(disk), entry)
            });
            ChainSpace::new(layers.collect::<Result<_, _>>()?)
        };
        let memory = space(None)?;
        let disks = (0..newest.manifest.disks.len()).map(|at| space(Some(at))).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Opened { files: files.clone(), members, sections, memory, disks })))
    }

    /// Directories of the snapshot and of those that it depends on, newest first.
    pub fn dirs(&self) -> impl Iterator<Item = &Path> {
        self.0.members.iter().map(|member| member.dir.path())
    }

    /// The same directories without links. They are the open ones, even if a path has changed since.
    ///
    /// # Errors
    /// When one of them was removed, or replaced by another snapshot.
    pub fn known_dirs(&self) -> Result<Vec<KnownDir>, Error> {
        known_dirs(&self.0.members)
    }

    /// The snapshot's identity.
    #[must_use]
    pub fn id(&self) -> SnapshotId {
        self.manifest().id
    }

    /// The path at which it was opened.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.0.members[0].dir.path()
    }

    /// The snapshot's manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.0.members[0].manifest
    }

    /// The number of snapshots in its chain: 1 for a full snapshot.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.0.members.len()
    }

    /// The section `name`.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&[u8]> {
        self.0.sections.get(name)
    }

    /// All sections.
    #[must_use]
    pub fn sections(&self) -> &Sections {
        &self.0.sections
    }

    /// The layout of guest memory.
    ///
    /// # Errors
    /// Never, for a snapshot that could be opened.
    pub fn layout(&self) -> Result<RamLayout, Error> {
        self.manifest().layout().map_err(|damage| Error::damaged(self.dir().join(MANIFEST), damage))
    }

    /// The pages that a run touched first, if that was recorded, for [`crate::Load::WorkingSet`].
    ///
    /// # Errors
    /// When the file is damaged. The rest of the snapshot is still usable.
    pub fn working_set(&self) -> Result<Option<Vec<PageRange>>, Error> {
        read_working_set(&self.0.files, &self.0.members[0])
    }
}

pub(crate) fn read_working_set(files: &FileOps, member: &Member) -> Result<Option<Vec<PageRange>>, Error> {
    let pages = member.manifest.memory.layer.bytes >> PAGE_SHIFT;
    let bytes = match files.read_in(&member.dir, WORKING_SET, WorkingSet::most_bytes(pages).min(MAX_WORKING_SET)) {
        Err(Error::File { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let damaged = |damage| Error::damaged(member.dir.path().join(WORKING_SET), damage);
    let warm = WorkingSet::decode(&bytes).map_err(damaged)?;
    // The file is of another snapshot, which was replaced by this one during its run.
    if warm.id != member.manifest.id {
        return Ok(None);
    }
    warm.check(pages).map_err(damaged)?;
    Ok(Some(warm.runs))
}
