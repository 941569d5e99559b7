//! The modules of a kernel that a guest needs before it can reach its disk and its agent.
//!
//! A distribution's kernel has drivers as modules. `modules.dep` has their dependencies, found by
//! depmod. Modules that `modules.softdep` lists before a module are loaded too, if they exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

/// Drivers without which the guest has no root or no agent.
const NEEDED: [&str; 4] = ["virtio_mmio", "virtio_blk", "ext4", "vmw_vsock_virtio_transport"];
/// Drivers of the other devices that a VM may have.
const USEFUL: [&str; 5] = ["virtio_net", "virtio_rng", "virtio_balloon", "virtio_console", "vmgenid"];
/// Most bytes of a list, and of a module when it is unpacked.
const MAX_LIST: u64 = 16 << 20;
const MAX_MODULE: u64 = 64 << 20;
/// Most modules. A distribution's kernel needs some twenty.
const MAX_MODULES: usize = 256;

/// Reason why a kernel's modules cannot be read.
#[derive(Debug, Error)]
pub(super) enum ModulesError {
    /// There is no list of modules.
    #[error("{0} has no modules.dep: it is to be a kernel's directory below /lib/modules, as depmod has left it")]
    NoList(PathBuf),
    /// A file cannot be read.
    #[error("{path} cannot be read")]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// A file is too large.
    #[error("{path} has more than {most} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its largest permitted size.
        most: u64,
    },
    /// The list names a file outside its directory.
    #[error("modules.dep names {0:?}, which is not below its directory")]
    Outside(String),
    /// A needed module is neither there nor built in.
    #[error("the kernel of {dir} has no {module}, neither as a module nor built in")]
    Missing {
        /// The directory.
        dir: PathBuf,
        /// The module.
        module: String,
    },
    /// Modules depend on each other.
    #[error("modules.dep: {0} needs itself")]
    Circle(String),
    /// There are too many modules.
    #[error("more than {MAX_MODULES} modules are needed")]
    TooMany,
    /// The module's compression is unknown.
    #[error("{0} is no .ko, .ko.gz, .ko.xz or .ko.zst")]
    Packing(PathBuf),
}

/// A module, unpacked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// The lists of a kernel's directory.
#[derive(Debug, Default)]
struct Lists {
    /// The file of each module, and its dependencies.
    modules: BTreeMap<String, (String, Vec<String>)>,
    builtin: BTreeSet<String>,
    /// Optional modules to load before a module.
    softdeps: BTreeMap<String, Vec<String>>,
    /// Other names of modules, without patterns.
    aliases: BTreeMap<String, Vec<String>>,
}

/// Returns the name of the module in a file: the kernel writes no dashes.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn read(path: &Path, most: u64) -> Result<Vec<u8>, ModulesError> {
    let mut bytes = Vec::new();
    let failed = |source| ModulesError::File { path: path.to_owned(), source };
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > most {
        return Err(ModulesError::TooLarge { path: path.to_owned(), most });
    }
    Ok(bytes)
}

impl Lists {
    fn read(dir: &Path) -> Result<Self, ModulesError> {
        if !dir.join("modules.dep").is_file() {
            return Err(ModulesError::NoList(dir.to_owned()));
        }
        let text =
            |name: &str| read(&dir.join(name), MAX_LIST).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        // Not every kernel has these.
        let other = |name: &str| if dir.join(name).exists() { text(name) } else { Ok(String::new()) };
        let mut lists = Self::default();
        for line in text("modules.dep")?.lines() {
            let Some((file, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_whitespace().map(name_of).collect();
            lists.modules.insert(name_of(file), (file.to_owned(), needs));
        }
        lists.builtin = other("modules.builtin")?.lines().map(name_of).collect();
        for line in other("modules.softdep")?.lines() {
            // softdep NAME pre: A B post: C
            let mut words = line.split_whitespace();
            let (Some("softdep"), Some(name)) = (words.next(), words.next()) else { continue };
            let before = words.skip_while(|word| *word != "pre:").skip(1).take_while(|word| *word != "post:");
            lists.softdeps.entry(name.replace('-', "_")).or_default().extend(before.map(|word| word.replace('-', "_")));
        }
        for line in other("modules.alias")?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["alias", alias, module] = words[..]
                && !alias.contains(['*', '?', '['])
            {
                lists.aliases.entry(alias.replace('-', "_")).or_default().push(module.replace('-', "_"));
            }
        }
        Ok(lists)
    }

    fn is_known(&self, name: &str) -> bool {
        self.modules.contains_key(name) || self.builtin.contains(name)
    }

    /// Adds `name` behind its dependencies. `above` are the modules that need it.
    fn add(&self, name: &str, above: &mut Vec<String>, order: &mut Vec<String>) -> Result<(), ModulesError> {
        let Some((_, needs)) = self.modules.get(name) else { return Ok(()) };
        if order.iter().any(|other| other == name) {
            return Ok(());
        }
        if above.iter().any(|other| other == name) {
            return Err(ModulesError::Circle(name.to_owned()));
        }
        if above.len() + order.len() >= MAX_MODULES {
            return Err(ModulesError::TooMany);
        }
        above.push(name.to_owned());
        for wanted in self.softdeps.get(name).into_iter().flatten() {
            let aliases = self.aliases.get(wanted).into_iter().flatten();
            for found in std::iter::once(wanted).chain(aliases) {
                // A soft dependency that needs this module cannot come before it.
                if !above.contains(found) {
                    self.add(found, above, order)?;
                }
            }
        }
        for needed in needs {
            self.add(needed, above, order)?;
        }
        above.pop();
        order.push(name.to_owned());
        Ok(())
    }

    /// Returns the modules that a guest loads, in order.
    fn order(&self, dir: &Path) -> Result<Vec<String>, ModulesError> {
        let mut order = Vec::new();
        for name in NEEDED {
            if !self.is_known(name) {
                return Err(ModulesError::Missing { dir: dir.to_owned(), module: name.to_owned() });
            }
        }
        for name in NEEDED.iter().chain(&USEFUL) {
            self.add(name, &mut Vec::new(), &mut order)?;
        }
        Ok(order)
    }
}

/// Reads a module in the form that the kernel loads: the kernel may not decompress it.
fn unpack(path: &Path) -> Result<Vec<u8>, ModulesError> {
    let packed = read(path, MAX_MODULE)?;
    let name = path.to_string_lossy();
    let reader: Box<dyn Read + '_> = if name.ends_with(".ko") {
        return Ok(packed);
    } else if name.ends_with(".ko.gz") {
        Box::new(flate2::read::MultiGzDecoder::new(&packed[..]))
    } else if name.ends_with(".ko.xz") {
        Box::new(liblzma::read::XzDecoder::new_multi_decoder(&packed[..]))
    } else if name.ends_with(".ko.zst") {
        let failed = |source| ModulesError::File { path: path.to_owned(), source };
        Box::new(zstd::Decoder::new(&packed[..]).map_err(failed)?)
    } else {
        return Err(ModulesError::Packing(path.to_owned()));
    };
    let mut bytes = Vec::new();
    let read = reader.take(MAX_MODULE + 1).read_to_end(&mut bytes);
    read.map_err(|source| ModulesError::File { path: path.to_owned(), source })?;
    if bytes.len() as u64 > MAX_MODULE {
        return Err(ModulesError::TooLarge { path: path.to_owned(), most: MAX_MODULE });
    }
    Ok(bytes)
}

/// Reads the modules that a guest needs, of the kernel whose modules are in `dir`, in the order of
/// their loading.
pub(super) fn needed(dir: &Path) -> Result<Vec<Module>, ModulesError> {
    let dir = fs::canonicalize(dir).map_err(|source| ModulesError::File { path: dir.to_owned(), source })?;
    let lists = Lists::read(&dir)?;
    let module = |name: String| {
        let (file, _) = &lists.modules[&name];
        // Older lists have whole paths, perhaps of another root.
        let is_below = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
        if !is_below {
            return Err(ModulesError::Outside(file.clone()));
        }
        Ok(Module { content: unpack(&dir.join(file))?, name })
    };
    lists.order(&dir)?.into_iter().map(module).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A kernel's directory, whose modules contain their names.
    struct Kernel(tempfile::TempDir);

    impl Kernel {
        /// Makes one with this list of dependencies.
        fn new(list: &str) -> Self {
            let kernel = Self(tempfile::tempdir().unwrap());
            kernel.write("modules.dep", list);
            for file in list.lines().filter_map(|line| line.split(':').next()) {
                kernel.write(file, &name_of(file));
            }
            kernel
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let mut bytes = text.as_bytes().to_vec();
            if name.ends_with(".xz") {
                bytes = Vec::new();
                liblzma::read::XzEncoder::new(text.as_bytes(), 1).read_to_end(&mut bytes).unwrap();
            } else if name.ends_with(".zst") {
                bytes = zstd::encode_all(text.as_bytes(), 1).unwrap();
            } else if name.ends_with(".gz") {
                let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                packed.write_all(text.as_bytes()).unwrap();
                bytes = packed.finish().unwrap();
            }
            fs::write(path, bytes).unwrap();
        }

        fn names(&self) -> Vec<String> {
            let modules = needed(self.0.path()).unwrap();
            modules.iter().for_each(|module| assert_eq!(module.content, module.name.as_bytes()));
            modules.into_iter().map(|module| module.name).collect()
        }

        fn error(&self) -> String {
            clade_vmm::error_chain(&needed(self.0.path()).unwrap_err())
        }
    }

    const LIST: &str = "kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio_ring.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio_ring.ko kernel/drivers/virtio/virtio.ko
kernel/fs/ext4/ext4.ko.zst: kernel/lib/crc16.ko.gz kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/fs/jbd2/jbd2.ko:
kernel/fs/mbcache.ko:
kernel/lib/crc16.ko.gz:
kernel/crypto/crc32c_generic.ko:
kernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko: kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko kernel/net/vmw_vsock/vsock.ko
kernel/net/vmw_vsock/vmw_vsock_virtio_transport_common.ko: kernel/net/vmw_vsock/vsock.ko
kernel/net/vmw_vsock/vsock.ko:
kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko
kernel/drivers/gpu/huge.ko: kernel/drivers/virtio/virtio.ko
";

    #[test]
    fn what_a_module_needs_is_loaded_before_it_and_nothing_else_is() {
        let kernel = Kernel::new(LIST);
        let plain = kernel.names();
        let at =
            |name: &str| plain.iter().position(|other| other == name).unwrap_or_else(|| panic!("{name}: {plain:?}"));
        for (first, then) in [
            ("virtio", "virtio_ring"),
            ("virtio_ring", "virtio_mmio"),
            ("virtio_ring", "virtio_blk"),
            ("crc16", "ext4"),
            ("mbcache", "ext4"),
            ("jbd2", "ext4"),
            ("vsock", "vmw_vsock_virtio_transport_common"),
            ("vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"),
            ("virtio", "virtio_rng"),
        ] {
            assert!(at(first) < at(then), "{first} before {then}: {plain:?}");
        }
        // Each one once.
        assert_eq!(plain.len(), 12, "{plain:?}");
        assert!(!plain.contains(&"huge".to_owned()) && !plain.contains(&"crc32c_generic".to_owned()));
        // Soft dependencies, by another name; missing ones are not needed.
        kernel.write("modules.softdep", "# soft\nsoftdep jbd2 pre: crypto-crc32c nowhere post: huge\n");
        kernel.write("modules.alias", "alias crypto-crc32c crc32c_generic\nalias crypto-* huge\n");
        let soft = kernel.names();
        let at = |name: &str| soft.iter().position(|other| other == name);
        assert!(soft.len() == 13 && at("crc32c_generic") < at("jbd2"), "{soft:?}");
    }

    #[test]
    fn what_is_built_in_is_not_loaded() {
        let list: String =
            LIST.lines().filter(|line| !line.starts_with("kernel/drivers/virtio/")).fold(String::new(), |all, line| {
                all + &line
                    .replace("kernel/drivers/virtio/virtio_ring.ko", "")
                    .replace("kernel/drivers/virtio/virtio.ko", "")
                    + "\n"
            });
        let kernel = Kernel::new(&list);
        assert!(kernel.error().contains("has no virtio_mmio"), "{}", kernel.error());
        kernel.write("modules.builtin", "kernel/drivers/virtio/virtio.ko\nkernel/drivers/virtio/virtio-mmio.ko\n");
        assert_eq!(kernel.names().len(), 9);
    }

    #[test]
    fn lists_that_cannot_be_are_refused_by_name() {
        let none = tempfile::tempdir().unwrap();
        let error = needed(none.path()).unwrap_err().to_string();
        assert!(error.contains(none.path().to_str().unwrap()) && error.contains("modules.dep"), "{error}");
        assert!(needed(Path::new("/nowhere/modules")).unwrap_err().to_string().contains("/nowhere/modules"));
        let with = |from: &str, to: &str| {
            let kernel = Kernel::new(LIST);
            fs::write(kernel.0.path().join("modules.dep"), LIST.replace(from, to)).unwrap();
            kernel.error()
        };
        assert!(
            with("kernel/fs/mbcache.ko:\n", "kernel/fs/mbcache.ko: kernel/fs/ext4/ext4.ko.zst\n")
                .contains("needs itself")
        );
        assert!(with("kernel/fs/mbcache.ko:", "../../../etc/mbcache.ko:").contains("not below"));
        assert!(with("kernel/fs/mbcache.ko:", "/etc/mbcache.ko:").contains("not below"));
        assert!(with("kernel/fs/mbcache.ko:", "kernel/fs/gone/mbcache.ko:").contains("gone/mbcache.ko cannot be read"));
        assert!(with("kernel/fs/mbcache.ko:", "kernel/fs/mbcache.ko.lz4:").contains("mbcache.ko.lz4"));
        let kernel = Kernel::new(LIST);
        fs::write(kernel.0.path().join("kernel/lib/crc16.ko.gz"), "not packed").unwrap();
        assert!(kernel.error().contains("crc16.ko.gz cannot be read"), "{}", kernel.error());
    }
}
