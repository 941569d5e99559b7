//! `clade help environment`: the variables that commands read.

/// The variables, with their meanings and defaults.
pub(super) const VARIABLES: &[(&str, &str)] = &[
    (
        "CLADE_RUNTIME_DIR",
        "The runtime directory: sockets of the supervisor and of VMs, and clade.log. Default: $XDG_RUNTIME_DIR/clade, else /run/clade for root and /tmp/clade-UID for others",
    ),
    ("CLADE_API", "The address of a supervisor's TCP API, tcp://HOST:PORT. Commands then ask that supervisor"),
    ("CLADE_TOKEN_FILE", "The file of the token for CLADE_API"),
    (
        "CLADE_LOG",
        "The log level on standard error: off, error, warn, info, debug, trace, or MODULE=LEVEL. Default: warn",
    ),
    ("CLADE_QUIRKS", "Adaptations to the host's KVM, instead of the detected ones: pvm or none"),
    ("CLADE_IMAGE_DIR", "The cache of OCI images. Default: clade/images in the user's cache directory"),
    ("CLADE_REGISTRY", "The registry of image names without one"),
    (
        "CLADE_CHECKPOINT_DIR",
        "The directory of kept checkpoints, with a subdirectory for each runtime directory. Default: clade/checkpoints in the user's data directory",
    ),
    ("CLADE_TEMPLATE_DIR", "The directory of templates. Default: clade/templates in the user's data directory"),
    ("CLADE_GUEST_CACHE", "Where the Linux guest is built. Default: clade in the user's cache directory"),
    ("CLADE_LINUX_GUEST", "The directory of the Linux guest. Default: in the user's cache directory"),
    (
        "CLADE_AGENT",
        "The agent that boots in images. Default: clade-agent beside the program or in ../lib/clade, else built once from the sources",
    ),
];

/// Returns the text of `clade help environment`.
pub(super) fn text() -> String {
    let mut text = "Environment variables:\n".to_owned();
    for (name, meaning) in VARIABLES {
        text.push_str(&format!("\n  {name}\n      {meaning}.\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Collects the variables that the sources in `dir` read, without those of tests, workers and
    /// hooks.
    fn read_in(dir: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                read_in(&path, found);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let named = text.split('"').filter(|part| part.len() > "CLADE_".len() && part.starts_with("CLADE_"));
                let is_name = |name: &&str| name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
                found.extend(named.filter(is_name).map(str::to_owned));
            }
        }
    }

    #[test]
    fn each_variable_that_a_command_reads_is_described() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut found = BTreeSet::new();
        for dir in ["cli/src/commands", "api/src", "worker/src", "supervisor/src", "oci/src", "vmm/src", "e2b/src"] {
            read_in(&root.join(dir), &mut found);
        }
        let of_tests_and_hooks = |name: &String| {
            ["CLADE_JAIL_", "CLADE_TEST_", "CLADE_BENCH_"].iter().any(|start| name.starts_with(start))
                || ["CLADE_EVENT", "CLADE_VM", "CLADE_TAP", "CLADE_MAC", "CLADE_PARENT", "CLADE_GENERATION"]
                    .contains(&name.as_str())
        };
        found.retain(|name| !of_tests_and_hooks(name));
        let script = std::fs::read_to_string(root.join("resources/linux/build.sh")).unwrap();
        found.extend(["CLADE_GUEST_CACHE"].into_iter().filter(|name| script.contains(name)).map(str::to_owned));
        let described: BTreeSet<String> = VARIABLES.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(found, described);
        assert!(text().contains("CLADE_RUNTIME_DIR\n"));
    }
}
