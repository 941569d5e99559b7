//! The directory of kept checkpoints of a runtime directory.

use std::path::{Component, Path, PathBuf};

use clade_e2b::user_data_dir;

/// Returns the directory for the checkpoints of the runtime directory `runtime`: in
/// `CLADE_CHECKPOINT_DIR`, else in `clade/checkpoints` of the user's data directory. None if neither
/// is known.
pub(super) fn checkpoint_dir(runtime: &Path) -> Option<PathBuf> {
    let dir = user_data_dir("CLADE_CHECKPOINT_DIR", "clade/checkpoints")?;
    Some(std::path::absolute(dir).ok()?.join(escaped(&std::path::absolute(runtime).ok()?)))
}

/// Returns a file name for a path, as systemd escapes paths: `/run/clade` is `run-clade`.
fn escaped(path: &Path) -> String {
    let mut name = String::new();
    for part in path.components().filter(|part| matches!(part, Component::Normal(_))) {
        if !name.is_empty() {
            name.push('-');
        }
        for byte in part.as_os_str().as_encoded_bytes() {
            match byte {
                b'.' if name.is_empty() => name.push_str("\\x2e"),
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' => name.push(char::from(*byte)),
                _ => name.push_str(&format!("\\x{byte:02x}")),
            }
        }
    }
    if name.is_empty() { "-".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_runtime_directory_has_a_name_of_its_own() {
        for (path, name) in [
            ("/run/clade", "run-clade"),
            ("/run//clade/", "run-clade"),
            ("/run-clade", "run\\x2dclade"),
            ("/tmp/.hidden/a b", "tmp-.hidden-a\\x20b"),
            ("/.hidden", "\\x2ehidden"),
            ("/é", "\\xc3\\xa9"),
            ("/", "-"),
        ] {
            assert_eq!(escaped(Path::new(path)), name, "{path}");
        }
    }
}
