//! Images whose name was taken by another file.

use super::*;

/// A clone's commit would write into a file without a name.
#[test]
fn nothing_is_committed_into_an_image_that_has_lost_its_name() {
    let bench = Bench::new();
    let mut disk = bench.open();
    let image = disk.fork();
    let mut child = image.open().unwrap();
    drop((disk, image));
    write(&mut child, 0, &[2; 4096]);
    fs::write(bench.dir.path().join("other"), vec![9; SIZE as usize]).unwrap();
    fs::rename(bench.dir.path().join("other"), &bench.path).unwrap();
    let (mut child, error) = *child.commit().unwrap_err();
    assert!(matches!(&error, CommitError::Replaced { path } if *path == bench.path), "{error}");
    // The disk still has its writes, and the image has the content of the other file.
    assert!(read(&mut child, 0, 8192) == [[2; 4096], [1; 4096]].concat());
    assert!(bench.image() == vec![9; SIZE as usize]);
}

/// The opened path leads to an unnamed file, as when the file is replaced during the open.
#[test]
fn an_image_that_is_replaced_while_it_is_opened_is_refused() {
    use std::os::fd::AsRawFd;
    let bench = Bench::new();
    let file = fs::OpenOptions::new().read(true).write(true).open(&bench.path).unwrap();
    fs::remove_file(&bench.path).unwrap();
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    for read_only in [false, true] {
        let overlays = Some(bench.dir.path().to_owned());
        let config = DiskConfig { read_only, overlays, ..DiskConfig::new(&path) };
        let error = Disk::open(&config).map(drop).unwrap_err();
        assert!(matches!(&error, DiskError::Replaced { path: named } if *named == path), "{error}");
    }
}
