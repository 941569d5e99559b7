//! Layers on a tree, and on a naive model: a map from whole paths.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::limits::{Bounded, Budget};
use crate::tar::{TarHeader, TarKind, TarReader};

/// The kind of a model's entry.
#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Dir,
    Link(String),
    File,
}

/// A path's node, by a number that hard links share, its owner, and its layer.
#[derive(Clone, Debug)]
struct Item {
    what: What,
    node: usize,
    uid: u32,
    layer: usize,
}

#[derive(Default)]
struct Model {
    items: BTreeMap<Vec<String>, Item>,
    nodes: usize,
}

type Path = Vec<String>;

fn split(path: &str) -> Path {
    path.split('/').filter(|part| !part.is_empty() && *part != ".").map(str::to_owned).collect()
}

impl Model {
    fn new_node(&mut self) -> usize {
        self.nodes += 1;
        self.nodes
    }

    /// The directory of a path, resolved from the start again at each link.
    fn directory(&mut self, path: &[String], layer: Option<usize>) -> Result<Option<Path>, ()> {
        let mut path = path.to_vec();
        'again: for _ in 0..=40 {
            let mut here = Path::new();
            for at in 0..path.len() {
                if path[at] == ".." {
                    here.pop();
                    continue;
                }
                let mut next = here.clone();
                next.push(path[at].clone());
                match self.items.get(&next).map(|item| item.what.clone()) {
                    Some(What::Dir) => here = next,
                    Some(What::Link(target)) => {
                        let base = if target.starts_with('/') { Path::new() } else { here };
                        path = [base, split(&target), path[at + 1..].to_vec()].concat();
                        continue 'again;
                    }
                    Some(What::File) => return if layer.is_some() { Err(()) } else { Ok(None) },
                    None => {
                        let Some(layer) = layer else { return Ok(None) };
                        let node = self.new_node();
                        self.items.insert(next.clone(), Item { what: What::Dir, node, uid: 0, layer });
                        here = next;
                    }
                }
            }
            return Ok(Some(here));
        }
        Err(())
    }

    fn remove(&mut self, path: &Path, itself: bool) {
        self.items.retain(|other, _| !(other.starts_with(path) && (itself || other != path)));
    }

    /// Whether a path is beneath something of this layer that takes the place of a link.
    fn is_new(&self, layer: &[Op], path: &str) -> bool {
        layer.iter().any(|op| match op {
            Op::Dir(own, _) | Op::File(own, _) | Op::Hard(own, _) => {
                let is_link = self.items.get(&split(own)).is_some_and(|item| matches!(item.what, What::Link(_)));
                is_link && path.starts_with(&format!("{own}/"))
            }
            Op::Link(..) | Op::Whiteout(_) | Op::Opaque(_) => false,
        })
    }

    fn apply(&mut self, layer: &[Op], number: usize) -> Result<(), ()> {
        let new: Vec<bool> = layer
            .iter()
            .map(|op| matches!(op, Op::Whiteout(path) | Op::Opaque(path) if self.is_new(layer, path)))
            .collect();
        for (op, _) in layer.iter().zip(&new).filter(|(_, new)| !**new) {
            if let Op::Opaque(path) = op
                && let (above, name) = path.rsplit_once('/').unwrap_or(("", path))
                && let Some(mut dir) = self.directory(&split(above), None)?
            {
                dir.push(name.to_owned());
                if self.items.get(&dir).is_some_and(|item| item.what == What::Dir) {
                    self.remove(&dir, false);
                }
            }
        }
        for (op, _) in layer.iter().zip(&new).filter(|(_, new)| !**new) {
            if let Op::Whiteout(path) = op {
                let whole = split(path);
                if let Some(mut dir) = self.directory(&whole[..whole.len() - 1], None)? {
                    dir.push(whole[whole.len() - 1].clone());
                    self.remove(&dir, true);
                }
            }
        }
        layer.iter().try_for_each(|op| self.put(op, number))
    }

    fn put(&mut self, op: &Op, layer: usize) -> Result<(), ()> {
        let (path, what, uid) = match op {
            Op::Dir(path, uid) => (path, What::Dir, *uid),
            Op::File(path, uid) => (path, What::File, *uid),
            Op::Link(path, target, uid) => (path, What::Link(target.clone()), *uid),
            Op::Hard(path, _) => (path, What::File, 0),
            Op::Whiteout(_) | Op::Opaque(_) => return Ok(()),
        };
        let whole = split(path);
        let mut full = self.directory(&whole[..whole.len() - 1], Some(layer))?.ok_or(())?;
        full.push(whole[whole.len() - 1].clone());
        let there = self.items.get(&full).cloned();
        if let Some(there) = &there {
            if there.what == What::Dir && what == What::Dir {
                self.items.insert(full, Item { uid, layer, ..there.clone() });
                return Ok(());
            }
            if there.layer == layer {
                return Err(());
            }
        }
        let item = match op {
            Op::Hard(_, target) => {
                let target = split(target);
                let mut at = self.directory(&target[..target.len() - 1], None)?.ok_or(())?;
                at.push(target[target.len() - 1].clone());
                let item = self.items.get(&at).filter(|item| item.what != What::Dir).cloned().ok_or(())?;
                Item { layer, ..item }
            }
            _ => Item { what, node: self.new_node(), uid, layer },
        };
        self.remove(&full, true);
        self.items.insert(full, item);
        Ok(())
    }

    /// Each path with its kind, its owner, and the first path of its node.
    fn shown(&self) -> BTreeMap<String, (What, u32, String)> {
        let mut first = BTreeMap::new();
        let mut shown = BTreeMap::new();
        for (path, item) in &self.items {
            let path = path.join("/");
            let name = first.entry(item.node).or_insert_with(|| path.clone()).clone();
            shown.insert(path, (item.what.clone(), item.uid, name));
        }
        shown
    }
}

fn shown(tree: &Tree) -> BTreeMap<String, (What, u32, String)> {
    let mut paths: BTreeMap<Vec<String>, NodeId> = BTreeMap::new();
    let mut left = vec![(ROOT, Path::new())];
    while let Some((id, path)) = left.pop() {
        for (name, entry) in tree.names(id).into_iter().flatten() {
            let mut path = path.clone();
            path.push(String::from_utf8(name.to_vec()).unwrap());
            left.push((entry.node, path.clone()));
            paths.insert(path, entry.node);
        }
    }
    let mut count: BTreeMap<NodeId, (u32, String)> = BTreeMap::new();
    for (path, id) in &paths {
        count.entry(*id).or_insert((0, path.join("/"))).0 += 1;
    }
    // Every kept node has its names, and there are no other nodes.
    assert_eq!(count.len() + 1, tree.nodes.iter().flatten().count());
    count.iter().for_each(|(id, (links, name))| assert_eq!(tree.node(*id).links, *links, "{name}"));
    let of = |(path, id): (&Path, &NodeId)| {
        let node = tree.node(*id);
        let what = match &node.content {
            Content::Dir(_) => What::Dir,
            Content::Symlink(target) => What::Link(String::from_utf8(target.to_vec()).unwrap()),
            _ => What::File,
        };
        (path.join("/"), (what, node.meta.uid, count[id].1.clone()))
    };
    paths.iter().map(of).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Dir(String, u32),
    File(String, u32),
    Link(String, String, u32),
    Hard(String, String),
    Whiteout(String),
    Opaque(String),
}

impl Op {
    fn header(&self) -> TarHeader {
        let entry = |path: &str, kind, link: &str, uid| TarHeader {
            path: path.into(),
            link: link.into(),
            kind,
            mode: 0o755,
            uid,
            gid: 0,
            mtime: 0,
            size: 0,
            xattrs: Vec::new(),
        };
        match self {
            Self::Dir(path, uid) => entry(path, TarKind::Dir, "", *uid),
            Self::File(path, uid) => entry(path, TarKind::File, "", *uid),
            Self::Link(path, target, uid) => entry(path, TarKind::Symlink, target, *uid),
            Self::Hard(path, target) => entry(path, TarKind::HardLink, target, 0),
            Self::Whiteout(path) => {
                let (above, name) = path.rsplit_once('/').unwrap_or((".", path));
                entry(&format!("{above}/.wh.{name}"), TarKind::File, "", 0)
            }
            Self::Opaque(path) => entry(&format!("{path}/.wh..wh..opq"), TarKind::File, "", 0),
        }
    }
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|parts| parts.join("/"))
}

fn op() -> impl Strategy<Value = Op> {
    let target = prop_oneof![
        path(),
        path().prop_map(|path| format!("/{path}")),
        path().prop_map(|path| format!("../{path}")),
        Just("../../..".to_owned()),
        Just(".".to_owned()),
    ];
    prop_oneof![
        4 => (path(), 1..9u32).prop_map(|(path, uid)| Op::Dir(path, uid)),
        4 => (path(), 1..9u32).prop_map(|(path, uid)| Op::File(path, uid)),
        2 => (path(), target, 1..9u32).prop_map(|(path, target, uid)| Op::Link(path, target, uid)),
        2 => (path(), path()).prop_map(|(path, target)| Op::Hard(path, target)),
        2 => path().prop_map(Op::Whiteout),
        1 => path().prop_map(Op::Opaque),
    ]
}

fn read(ops: &[Op]) -> Layer {
    let mut spool = Spool::new(tempfile::tempfile().unwrap());
    Layer::of(ops.iter().map(Op::header), &mut spool, &mut TarReader::new(std::io::empty())).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layers_make_what_the_model_makes(layers in prop::collection::vec(prop::collection::vec(op(), 0..7), 1..5)) {
        let (mut tree, mut model) = (Tree::new(&ImageLimits::default()), Model::default());
        for (number, layer) in layers.iter().enumerate() {
            let (ours, theirs) = (tree.apply(read(layer), number), model.apply(layer, number));
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?}", ours);
            if ours.is_err() {
                break;
            }
            prop_assert_eq!(shown(&tree), model.shown());
        }
    }
}

#[test]
fn a_whiteout_is_of_the_layers_below_wherever_it_stands() {
    let mut tree = Tree::new(&ImageLimits::default());
    tree.apply(read(&[Op::Dir("a".into(), 1), Op::File("a/b".into(), 1), Op::File("a/c".into(), 1)]), 0).unwrap();
    tree.apply(read(&[Op::File("a/b".into(), 2), Op::Whiteout("a/b".into()), Op::Opaque("a".into())]), 1).unwrap();
    assert_eq!(shown(&tree).keys().collect::<Vec<_>>(), ["a", "a/b"]);
}

#[test]
fn an_opaque_directory_in_the_place_of_a_link_hides_nothing_behind_the_link() {
    let mut tree = Tree::new(&ImageLimits::default());
    let lower = [Op::File("usr/lib/modules/a".into(), 1), Op::Link("modules".into(), "usr/lib/modules".into(), 1)];
    tree.apply(read(&lower), 0).unwrap();
    let upper = [Op::Opaque("modules".into()), Op::Dir("modules".into(), 2), Op::File("modules/x".into(), 2)];
    tree.apply(read(&upper), 1).unwrap();
    let files = ["modules", "modules/x", "usr", "usr/lib", "usr/lib/modules", "usr/lib/modules/a"];
    assert_eq!(shown(&tree).keys().collect::<Vec<_>>(), files);
}

#[test]
fn whiteouts_in_the_place_of_a_link_hide_nothing_behind_the_link() {
    let mut tree = Tree::new(&ImageLimits::default());
    let lower = [Op::File("usr/lib/x/y".into(), 1), Op::Link("a".into(), "usr/lib".into(), 1)];
    tree.apply(read(&lower), 0).unwrap();
    let upper = [Op::Dir("a".into(), 2), Op::Whiteout("a/x".into()), Op::Opaque("a/x".into())];
    tree.apply(read(&upper), 1).unwrap();
    assert_eq!(shown(&tree).keys().collect::<Vec<_>>(), ["a", "usr", "usr/lib", "usr/lib/x", "usr/lib/x/y"]);
    // As many long paths as an image may have are walked no further than the tree goes.
    let deep: Vec<_> = (0..2000).map(|n| Op::Whiteout(format!("{n}/{}x", "a/".repeat(1000)))).collect();
    tree.apply(read(&deep), 2).unwrap();
    // A link that stays, or is set anew, is followed.
    let mut tree = Tree::new(&ImageLimits::default());
    tree.apply(read(&lower), 0).unwrap();
    tree.apply(read(&[Op::Link("a".into(), "usr/lib".into(), 2), Op::Whiteout("a/x".into())]), 1).unwrap();
    assert_eq!(shown(&tree).keys().collect::<Vec<_>>(), ["a", "usr", "usr/lib"]);
}

#[test]
fn the_components_of_links_that_an_images_paths_lead_over_are_bounded() {
    let mut tree = Tree::new(&ImageLimits::default());
    // Forth and back, as often as fits into a link's target; each link leads over the one before.
    let long = |end: &str| format!("{}{end}", "d/../".repeat(800));
    let links =
        (0..30).map(|n| Op::Link(format!("l{n}"), long(&if n == 0 { "d".into() } else { format!("l{}", n - 1) }), 1));
    tree.apply(read(&[Op::Dir("d".into(), 1)].into_iter().chain(links).collect::<Vec<_>>()), 0).unwrap();
    // 30 links of 1,601 components for each file.
    let files: Vec<_> = (0..400).map(|n| Op::File(format!("l29/f{n}"), 1)).collect();
    tree.apply(read(&files[..300]), 1).unwrap();
    let error = tree.apply(read(&files[300..]), 2).unwrap_err();
    assert!(matches!(error, LayerError::Limit(LimitError::LinkSteps(16_777_216))), "{error}");
    // Components that are skipped count as well.
    let mut tree = Tree::new(&ImageLimits::default());
    tree.apply(read(&[Op::Link("r".into(), "/".repeat(4000), 1)]), 0).unwrap();
    let files: Vec<_> = (0..500).map(|n| Op::File(format!("{}f{n}", "r/".repeat(10)), 1)).collect();
    let error = tree.apply(read(&files), 1).unwrap_err();
    assert!(matches!(error, LayerError::Limit(LimitError::LinkSteps(16_777_216))), "{error}");
}

#[test]
fn directories_that_an_entry_implies_are_counted() {
    let limits = ImageLimits { entries: 9, ..ImageLimits::default() };
    let apply = |tree: &mut Tree, path: &str, number| tree.apply(read(&[Op::File(path.into(), 1)]), number);
    let mut tree = Tree::new(&limits);
    apply(&mut tree, "a/b/c/d/e/f/g/h/i", 0).unwrap();
    let error = apply(&mut tree, "j", 1).unwrap_err();
    assert!(matches!(error, LayerError::Limit(LimitError::Entries(9))), "{error}");
    let error = apply(&mut Tree::new(&limits), "a/b/c/d/e/f/g/h/i/j", 0).unwrap_err();
    assert!(matches!(error, LayerError::Limit(LimitError::Entries(9))), "{error}");
    // Those that a layer removes have left room.
    tree.apply(read(&[Op::Whiteout("a/b".into())]), 2).unwrap();
    apply(&mut tree, "j/k", 3).unwrap();
}

#[test]
fn a_link_may_take_the_place_of_a_directory_that_has_its_file() {
    let mut tree = Tree::new(&ImageLimits::default());
    tree.apply(read(&[Op::File("d/f".into(), 3)]), 0).unwrap();
    tree.apply(read(&[Op::Hard("d".into(), "d/f".into())]), 1).unwrap();
    assert_eq!(shown(&tree)["d"], (What::File, 3, "d".to_owned()));
    // A link to itself, too.
    tree.apply(read(&[Op::Hard("d".into(), "d".into())]), 2).unwrap();
    assert_eq!(shown(&tree)["d"], (What::File, 3, "d".to_owned()));
}

/// A header of an archive, for that many bytes, and these.
fn block(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512 + bytes.len().next_multiple_of(512)];
    block[0] = b'x';
    block[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
    block[148..156].fill(b' ');
    block[156] = kind;
    let sum: u32 = block[..512].iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block[512..512 + bytes.len()].copy_from_slice(bytes);
    block
}

/// Layers keep the headers of a million entries.
#[test]
fn a_header_takes_no_more_memory_than_is_counted() {
    let mut long = vec![b'y'; 4097];
    long[..2].copy_from_slice(b"a\0");
    let archive = [block(b'L', &long), block(b'K', &long), block(b'0', b"")].concat();
    let mut header = TarReader::new(&archive[..]).next_entry().unwrap().unwrap();
    assert_eq!((&*header.path, &*header.link), (&b"a"[..], &b"a"[..]));
    assert!(header.path.capacity() < 64 && header.link.capacity() < 64, "{header:?}");
    header.xattrs = (0..40_000).map(|n| (format!("trusted.{n}").into_bytes().into(), [].into())).collect();
    assert_eq!(apply::sort_xattrs(&mut header).unwrap(), 40_000);
    assert_eq!(header.xattrs.capacity(), 0);

    let attributes: Vec<u8> = (0..1000)
        .flat_map(|n| {
            let record = format!("SCHILY.xattr.trusted.{n:04}=\n");
            format!("{} {record}", record.len() + 3).into_bytes()
        })
        .collect();
    let archive = [block(b'x', &attributes), block(b'0', b""), vec![0; 1024]].concat();
    let mut budget = Budget::new(&ImageLimits::default());
    let mut spool = Spool::new(tempfile::tempfile().unwrap());
    let compressed = std::rc::Rc::new(std::cell::Cell::new(archive.len() as u64));
    let (layer, _) = Layer::read(Bounded::new(&archive[..], compressed, &mut budget), &mut spool).unwrap();
    assert_eq!(layer.skipped, 1000);
    let refused = budget.take_entry((512 << 20) - 64 * 1000);
    assert!(matches!(refused, Err(LimitError::Names(_))), "{refused:?}");
}
