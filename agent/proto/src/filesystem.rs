//! Messages of `filesystem.Filesystem`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::json::{is_default, long, number};
pub use crate::process::KeepAlive;

/// The type of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileType {
    /// A regular file.
    #[serde(rename = "FILE_TYPE_FILE")]
    File,
    /// A directory.
    #[serde(rename = "FILE_TYPE_DIRECTORY")]
    Directory,
    /// A symbolic link.
    #[serde(rename = "FILE_TYPE_SYMLINK")]
    Symlink,
    /// Any other type.
    #[default]
    #[serde(rename = "FILE_TYPE_UNSPECIFIED", other)]
    Unspecified,
}

/// An entry of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EntryInfo {
    /// Its name.
    #[serde(skip_serializing_if = "is_default")]
    pub name: String,
    /// Its type; for a link, the target's.
    #[serde(rename = "type", skip_serializing_if = "is_default")]
    pub kind: FileType,
    /// Its path.
    #[serde(skip_serializing_if = "is_default")]
    pub path: String,
    /// Size in bytes.
    #[serde(skip_serializing_if = "is_default", with = "long")]
    pub size: i64,
    /// Permission bits; for a link, the target's.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "number::deserialize")]
    pub mode: u32,
    /// The entry's own type and permissions, in letters.
    #[serde(skip_serializing_if = "is_default")]
    pub permissions: String,
    /// The owner's name, or number.
    #[serde(skip_serializing_if = "is_default")]
    pub owner: String,
    /// The group's name, or number.
    #[serde(skip_serializing_if = "is_default")]
    pub group: String,
    /// Its modification time as in RFC 3339.
    #[serde(skip_serializing_if = "is_default", alias = "modified_time")]
    pub modified_time: Option<String>,
    /// The target of a link.
    #[serde(skip_serializing_if = "is_default", alias = "symlink_target")]
    pub symlink_target: Option<String>,
    /// The attributes `user.e2b.*`.
    #[serde(skip_serializing_if = "is_default")]
    pub metadata: BTreeMap<String, String>,
}

/// Makes a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MakeDirRequest {
    /// The path.
    pub path: String,
    /// The permissions of the directory itself, of which envd has no field.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// Names a path, for `Stat` and `Remove`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathRequest {
    /// The path.
    pub path: String,
}

/// Moves an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MoveRequest {
    /// The present path.
    pub source: String,
    /// The new path.
    pub destination: String,
}

/// Lists a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListDirRequest {
    /// The directory.
    pub path: String,
    /// Number of levels; 0 means one.
    #[serde(skip_serializing_if = "is_default", deserialize_with = "number::deserialize")]
    pub depth: u32,
}

/// One entry: the answer of `Stat`, `MakeDir` and `Move`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EntryResponse {
    /// The entry.
    pub entry: EntryInfo,
}

/// The entries of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListDirResponse {
    /// The entries.
    #[serde(skip_serializing_if = "is_default")]
    pub entries: Vec<EntryInfo>,
}

/// Watches a directory: `WatchDir` and `CreateWatcher`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct WatchRequest {
    /// The directory.
    pub path: String,
    /// Whether to include the directories below it.
    #[serde(skip_serializing_if = "is_default")]
    pub recursive: bool,
    /// Whether events include the entry's information, while it exists.
    #[serde(skip_serializing_if = "is_default", alias = "include_entry")]
    pub include_entry: bool,
    /// Whether to allow file systems of other machines.
    #[serde(skip_serializing_if = "is_default", alias = "allow_network_mounts")]
    pub allow_network_mounts: bool,
}

/// The type of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventType {
    /// The entry was created, or moved here.
    #[serde(rename = "EVENT_TYPE_CREATE")]
    Create,
    /// The entry was written.
    #[serde(rename = "EVENT_TYPE_WRITE")]
    Write,
    /// The entry was removed.
    #[serde(rename = "EVENT_TYPE_REMOVE")]
    Remove,
    /// The entry was moved away.
    #[serde(rename = "EVENT_TYPE_RENAME")]
    Rename,
    /// The entry's owner, times or permissions changed.
    #[serde(rename = "EVENT_TYPE_CHMOD")]
    Chmod,
    /// Any other type.
    #[default]
    #[serde(rename = "EVENT_TYPE_UNSPECIFIED", other)]
    Unspecified,
}

/// One event of a watch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FilesystemEvent {
    /// The entry's path below the watched directory.
    #[serde(skip_serializing_if = "is_default")]
    pub name: String,
    /// The type of the event.
    #[serde(rename = "type", skip_serializing_if = "is_default")]
    pub kind: EventType,
    /// The entry.
    #[serde(skip_serializing_if = "is_default")]
    pub entry: Option<EntryInfo>,
}

/// A message of the stream of `WatchDir`: one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchDirResponse {
    /// The first message.
    #[serde(skip_serializing_if = "is_default")]
    pub start: Option<KeepAlive>,
    /// An event.
    #[serde(skip_serializing_if = "is_default")]
    pub filesystem: Option<FilesystemEvent>,
    /// A keepalive.
    #[serde(skip_serializing_if = "is_default")]
    pub keepalive: Option<KeepAlive>,
}

/// The name of a watcher: the answer of `CreateWatcher`, and the request of `GetWatcherEvents` and
/// `RemoveWatcher`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Watcher {
    /// Its name.
    #[serde(alias = "watcher_id")]
    pub watcher_id: String,
}

/// The events since the last call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatcherEvents {
    /// The events.
    #[serde(skip_serializing_if = "is_default")]
    pub events: Vec<FilesystemEvent>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::{decode, encode};

    #[test]
    fn entries_are_written_as_protobuf_writes_them() {
        let entry = EntryInfo {
            name: "a".into(),
            kind: FileType::File,
            size: 5_000_000_000,
            modified_time: Some("2026-01-02T03:04:05Z".into()),
            ..EntryInfo::default()
        };
        let text = r#"{"name":"a","type":"FILE_TYPE_FILE","size":"5000000000","modifiedTime":"2026-01-02T03:04:05Z"}"#;
        assert_eq!(String::from_utf8(encode(&entry)).unwrap(), text);
        assert_eq!(decode::<EntryInfo>(text.as_bytes()).unwrap(), entry);
        assert_eq!(decode::<Watcher>(br#"{"watcher_id":"w1"}"#).unwrap().watcher_id, "w1");
        assert_eq!(decode::<EntryInfo>(br#"{"type":"FILE_TYPE_NEW"}"#).unwrap().kind, FileType::Unspecified);
    }
}
