use super::*;

#[test]
fn children_get_interfaces_named_like_their_parents() {
    let rows = [
        ("web%d", "web7", "web%d"),
        ("web0", "web0", "web%d"),
        ("tap", "tap", "tap%d"),
        ("eth%d", "", "clade%d"),
        ("eth0", "", "clade%d"),
        ("123", "123", "clade%d"),
        ("abcdefghijklmno", "abcdefghijklmno", "abcdefghijk%d"),
    ];
    for (configured, own, wanted) in rows {
        assert_eq!(pattern(configured, own), wanted);
    }
}

fn config(socket: &Path, cid: u64) -> VmConfig {
    let mut config = VmConfig::new(1 << 20, 1).unwrap();
    config.vsock = Some(VsockOptions { cid, socket: socket.to_owned() });
    config
}

#[test]
fn nobody_shares_an_address_or_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("parent.vsock");
    let claim = clade_test_support::Cid::take();
    let cid = u64::from(claim.number());
    let config = config(&socket, cid);
    let parent = Endpoints::boot(&config).unwrap();
    let again = Endpoints::boot(&config).unwrap_err().to_string();
    assert_eq!(again, format!("CID {cid} is in use by another VM of this host"));

    let child = |name: &str, choice: &ChildIdentity| Endpoints::child(&config, parent.identity(), name, choice);
    let none = ChildIdentity::default();
    let (one, two) = (child("one", &none).unwrap(), child("two", &none).unwrap());
    let vsock = |ends: &Endpoints| ends.identity().vsock.clone().unwrap();
    assert_eq!(vsock(&one).socket, dir.path().join("one.vsock"));
    let cids = [cid, vsock(&one).cid, vsock(&two).cid];
    assert!(cids[0] < cids[1] && cids[1] < cids[2], "{cids:?}");

    let choose = |cid, socket: Option<&str>| ChildIdentity {
        vsock: Some(VsockChoice { cid, socket: socket.map(|name| dir.path().join(name)) }),
        ..ChildIdentity::default()
    };
    let refused = child("three", &choose(Some(cids[1]), None)).unwrap_err().to_string();
    assert!(refused.contains(&cids[1].to_string()), "{refused}");
    let refused = child("three", &choose(None, Some("{name}.vsock"))).map(|ends| vsock(&ends).socket);
    assert_eq!(refused.unwrap(), dir.path().join("three.vsock"), "made, and dropped again");
    let refused = child("four", &choose(None, Some("one.vsock"))).unwrap_err().to_string();
    assert!(refused.contains("one.vsock"), "{refused}");
    let refused = child("five", &ChildIdentity { nets: vec![NetChoice::default()], ..ChildIdentity::default() });
    assert_eq!(refused.unwrap_err().to_string(), "1 network interfaces are chosen for a VM with 0");

    let left = || fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left(), 3, "what was refused left nothing");
    drop((one, two, parent));
    assert_eq!(left(), 0);
    // And the address is free again.
    drop(Endpoints::boot(&config).unwrap());
}

/// A snapshot may contain any socket and interface of the host, and the last possible CID.
#[test]
fn what_a_snapshot_says_of_the_host_is_not_believed() {
    let (victim, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = config(&victim.path().join("vm.vsock"), u64::MAX);
    let mut saved = Identity {
        nets: vec![NetIdentity { tap: "eth0".to_owned(), mac: Mac([2, 0, 0, 0, 0, 1]) }],
        vsock: config.vsock.clone(),
    };
    saved.forget_host(None);
    assert_eq!(saved.nets[0].tap, "");
    let none = ChildIdentity::default();
    let refused = Endpoints::child(&config, &saved, "vm", &none).unwrap_err();
    assert!(matches!(&refused, IdentityError::NoSocket { name } if name == "vm"), "{refused}");
    let choice = VsockChoice { cid: None, socket: Some(ours.path().join("chosen")) };
    let chosen = ChildIdentity { vsock: Some(choice), ..ChildIdentity::default() };
    let made = Endpoints::child(&config, &saved, "vm", &chosen).unwrap();
    assert_eq!(made.identity().vsock.as_ref().unwrap().socket, ours.path().join("chosen"));
    saved.forget_host(Some(ours.path()));
    let made = Endpoints::child(&config, &saved, "vm", &none).unwrap();
    assert_eq!(made.identity().vsock.as_ref().unwrap().socket, ours.path().join("vm.vsock"));
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
}

#[test]
fn a_dead_socket_is_replaced_and_a_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vm.vsock");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let cid = 0x6000_0000 | u64::from(std::process::id());
    drop(Endpoints::boot(&config(&socket, cid)).unwrap());
    fs::write(&socket, "a file").unwrap();
    let refused = Endpoints::boot(&config(&socket, cid)).unwrap_err().to_string();
    assert!(refused.contains("vm.vsock"), "{refused}");
    assert_eq!(fs::read_to_string(&socket).unwrap(), "a file");
}

#[test]
fn a_choice_for_what_is_not_there_is_refused() {
    let bare = VmConfig::new(1 << 20, 1).unwrap();
    let choice = VsockChoice { cid: Some(77), socket: None };
    let choice = ChildIdentity { vsock: Some(choice), ..ChildIdentity::default() };
    let refused = Endpoints::child(&bare, &Identity::default(), "child", &choice).unwrap_err().to_string();
    assert!(refused.contains("77"), "{refused}");
}
