//! Users and groups, from `/etc/passwd` and `/etc/group`, the only directory of a static program.

use std::collections::HashMap;
use std::fs;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";
/// Maximum number of bytes read of either.
const MAX_FILE: u64 = 1 << 20;

/// A user that processes run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
    /// All groups, the primary one first.
    pub(crate) groups: Vec<u32>,
}

fn read(path: &str) -> String {
    let text = fs::File::open(path).and_then(|file| {
        use std::io::Read;
        let mut text = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut text).map(|_| text)
    });
    // A guest may have neither.
    String::from_utf8_lossy(&text.unwrap_or_default()).into_owned()
}

/// To the kernel's calls this number of a user or group is none: a program would keep the agent's, which is root.
const UNCHANGED: u32 = u32::MAX;

/// The user `name`, or of the number `name`, if there is one. `root` always exists, and so does every number: as
/// with docker it has the group of root if it is not listed.
pub(crate) fn find(name: &str) -> Option<User> {
    find_in(name, &read(PASSWD), &read(GROUP))
}

/// The same, with a group after a colon in place of the user's own.
pub(crate) fn find_with_group(text: &str) -> Option<User> {
    with_group_in(text, &read(PASSWD), &read(GROUP))
}

fn with_group_in(text: &str, passwd: &str, group: &str) -> Option<User> {
    let Some((name, wanted)) = text.split_once(':') else { return find_in(text, passwd, group) };
    let user = find_in(name, passwd, group)?;
    let listed = group.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(wanted)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    let gid = listed.or_else(|| wanted.parse().ok()).filter(|gid| *gid != UNCHANGED)?;
    Some(User { gid, groups: vec![gid], ..user })
}

fn find_in(name: &str, passwd: &str, group: &str) -> Option<User> {
    let number: Option<u32> = name.parse().ok();
    let listed = |is_it: &dyn Fn(&str, u32) -> bool| {
        passwd.lines().find_map(|line| {
            let [known, _, uid, gid, _, home, ..] = line.split(':').collect::<Vec<_>>()[..] else { return None };
            let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
            is_it(known, uid).then_some((known, uid, gid, home))
        })
    };
    let unlisted = || match (name, number) {
        ("root", _) | (_, Some(0)) => Some(("root", 0, 0, "/root")),
        (_, Some(number)) => Some((name, number, 0, "/")),
        (_, None) => None,
    };
    // A name may consist of digits.
    let named = listed(&|known, _| known == name).or_else(|| listed(&|_, uid| Some(uid) == number));
    let (name, uid, gid, home) =
        named.or_else(unlisted).filter(|(_, uid, gid, _)| ![*uid, *gid].contains(&UNCHANGED))?;
    let mut groups = vec![gid];
    for line in group.lines() {
        let [_, _, other, members] = line.split(':').collect::<Vec<_>>()[..] else { continue };
        if let Ok(other) = other.parse()
            && other != UNCHANGED
            && !groups.contains(&other)
            && members.split(',').any(|member| member == name)
        {
            groups.push(other);
        }
    }
    let home = if home.is_empty() { "/" } else { home };
    Some(User { name: name.to_owned(), uid, gid, home: home.to_owned(), groups })
}

/// Names by number.
#[derive(Debug)]
pub(crate) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    pub(crate) fn read() -> Self {
        let names = |text: String| {
            let mut names = HashMap::new();
            for line in text.lines() {
                let mut fields = line.split(':');
                let (name, number) = (fields.next(), fields.nth(1).and_then(|number| number.parse().ok()));
                if let (Some(name), Some(number)) = (name, number) {
                    names.entry(number).or_insert_with(|| name.to_owned());
                }
            }
            names
        };
        Self { users: names(read(PASSWD)), groups: names(read(GROUP)) }
    }

    pub(crate) fn user(&self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups.get(&gid).cloned().unwrap_or_else(|| gid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str = "root:x:0:0:root:/root:/bin/sh\n\nbad\nann:x:7:8::/home/ann:/bin/sh\nodd:x:y:8::/:/bin/sh\n";
    const GROUPS: &str = "root:x:0:\nstaff:x:20:bob,ann\nann:x:8:ann\nann2:x:9:annie\n";

    #[test]
    fn users_are_found_with_their_groups() {
        let ann = find_in("ann", USERS, GROUPS).unwrap();
        assert_eq!((ann.uid, ann.gid, ann.home.as_str()), (7, 8, "/home/ann"));
        assert_eq!(ann.groups, [8, 20]);
        assert_eq!(find_in("odd", USERS, GROUPS), None);
        assert_eq!(find_in("nobody", USERS, GROUPS), None);
    }

    #[test]
    fn a_group_behind_a_colon_is_the_only_one() {
        let of = |text: &str| with_group_in(text, USERS, GROUPS).map(|user| (user.uid, user.gid, user.groups));
        assert_eq!(of("ann:staff"), Some((7, 20, vec![20])));
        assert_eq!(of("1000:77"), Some((1000, 77, vec![77])));
        assert_eq!(of("ann"), Some((7, 8, vec![8, 20])));
        assert_eq!(of("ann:nobody").or(of("nobody:staff")).or(of("ann:")), None);
    }

    #[test]
    fn root_and_numbers_are_there_without_files() {
        assert_eq!(find_in("root", "", "").unwrap().uid, 0);
        let of = |number: &str| find_in(number, USERS, GROUPS).map(|user| (user.name, user.uid, user.gid, user.home));
        assert_eq!(of("7").unwrap(), ("ann".to_owned(), 7, 8, "/home/ann".to_owned()));
        assert_eq!(find_in("7", USERS, GROUPS).unwrap().groups, [8, 20]);
        assert_eq!(of("0").unwrap(), ("root".to_owned(), 0, 0, "/root".to_owned()));
        assert_eq!(of("1000").unwrap(), ("1000".to_owned(), 1000, 0, "/".to_owned()));
        assert_eq!(find_in("0", "", "").unwrap().home, "/root");
        let digits = "1:x:5:6::/:/bin/sh\nann:x:1:8::/home/ann:/bin/sh\n";
        assert_eq!(find_in("1", digits, "").unwrap().uid, 5, "a name");
        assert_eq!(find_in("-1", "", ""), None);
    }

    /// With -1 the kernel leaves a number as it is, which is root's.
    #[test]
    fn the_number_that_changes_nothing_is_no_user_and_no_group() {
        let none = u32::MAX.to_string();
        let (passwd, group) =
            (format!("odd:x:{none}:1::/:\nodder:x:1:{none}::/:\nann:x:7:8::/:"), format!("odd:x:{none}:ann"));
        for name in [&none, "odd", "odder", &format!("{none}:7"), &format!("7:{none}"), "ann:odd"] {
            assert_eq!(with_group_in(name, &passwd, &group), None, "{name}");
        }
        assert_eq!(find_in("ann", &passwd, &group).unwrap().groups, [8]);
    }
}
