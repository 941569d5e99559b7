//! VMs that have a time to live.

use std::time::{Duration, Instant};

use crate::supervisor::Supervised;
use crate::tool::{kvm, wait_until};

#[test]
fn a_vm_is_stopped_when_its_time_is_over_unless_that_is_put_off() {
    if !kvm() {
        return;
    }
    let all = Supervised::start("0");
    all.boot("web", &["--ttl", "1h"]);
    let left = |name: &str| all.http("GET", &format!("/v1/vms/{name}/ttl"), "").1["seconds_left"].as_f64();
    assert!(left("web").is_some_and(|left| left > 3500.0 && left <= 3600.0), "{:?}", left("web"));
    let begun = Instant::now();
    assert_eq!(all.fork(&["web", "--count", "3", "--ttl", "2s"]).len(), 3);
    assert!(left("web-1").is_some_and(|left| left <= 2.0));
    let (status, answer) = all.http("PUT", "/v1/vms/web-2/ttl", r#"{"seconds": 3600}"#);
    assert!(status == 200 && answer["seconds_left"].as_f64() > Some(3500.0), "{answer}");
    assert!(all.http("DELETE", "/v1/vms/web-3/ttl", "").1["seconds_left"].is_null());
    wait_until("the end of its time", || !all.runtime.names().contains(&"web-1".to_owned()));
    assert!(begun.elapsed() >= Duration::from_secs(2));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(all.runtime.names(), ["web", "web-2", "web-3"]);
    assert_eq!(left("web-3"), None);
    // Another VM of the name has no time of the one before.
    all.fork(&["web", "--name", "web-1"]);
    assert_eq!(left("web-1"), None);
    for (body, named) in
        [(r#"{"seconds": 0}"#, "0"), (r#"{"seconds": -1}"#, "-1"), (r#"{"seconds": 1e300}"#, "seconds")]
    {
        let (status, answer) = all.http("PUT", "/v1/vms/web/ttl", body);
        assert!(status == 400 && answer.to_string().contains(named), "{answer}");
    }
    assert_eq!(all.http("GET", "/v1/vms/nobody/ttl", "").0, 404);
    for bad in [&["fork", "web", "--ttl", "soon"][..], &["run", "--kernel", "bare", "--ttl", "5s"]] {
        assert_eq!(all.runtime.clade(bad).code, Some(2), "{bad:?}");
    }
    all.end();
}
