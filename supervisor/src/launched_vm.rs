//! New VMs, as the supervisor has made them.

use super::vm_record::VmRecord;
use clade_api::{ErasedInfo, IdentityInfo};
use clade_worker::ReportedVm;

/// A VM in a process of its own. Its name, interfaces, addresses and sockets are those that the supervisor has given
/// it: the process that reports them may have been broken into by a guest's memory.
#[derive(Clone, Debug)]
pub(super) struct LaunchedVm {
    pub(super) name: String,
    /// None if it has no network or socket device.
    pub(super) identity: Option<IdentityInfo>,
    /// The count of secrets erased in its memory.
    pub(super) erased: ErasedInfo,
}

impl LaunchedVm {
    /// Takes the states of network devices, and the count of secrets, from the process's report alone.
    pub(super) fn new(name: &str, vm_record: &VmRecord, reported: ReportedVm) -> Self {
        let own = &vm_record.identity.nets;
        let mut nets = reported.identity.map_or_else(Vec::new, |identity| identity.nets);
        nets.truncate(own.len());
        for (net, own) in nets.iter_mut().zip(own) {
            net.tap.clone_from(&own.tap);
            net.mac = own.mac;
        }
        let vsock = vm_record.vsock();
        let identity = (!nets.is_empty() || vsock.is_some()).then_some(IdentityInfo { nets, vsock });
        Self { name: name.to_owned(), identity, erased: reported.erased }
    }
}

#[cfg(test)]
mod tests {
    use clade_api::{NetInfo, VsockInfo};
    use clade_vmm::vm::NetIdentity;
    use serde_json::json;

    use super::super::vm_record::tests::record_with;
    use super::*;

    #[test]
    fn another_vms_name_interface_and_socket_in_a_report_are_not_shown() {
        let mut record = record_with(Some("/run/clade/web.vsock"));
        let own = NetIdentity { tap: "tap1".to_owned(), mac: "52:54:00:00:00:01".parse().unwrap() };
        record.identity.nets = vec![own.clone()];
        let net = |tap: &str, sent_bytes: u64| -> NetInfo {
            let mac = "52:54:00:00:00:99";
            let net = json!({ "tap": tap, "mac": mac, "received_bytes": 0, "sent_bytes": sent_bytes, "dropped": 0 });
            serde_json::from_value(net).unwrap()
        };
        let lies = IdentityInfo {
            nets: vec![net("tap9", 7), net("eth0", 8)],
            vsock: Some(VsockInfo { cid: 9, socket: "/run/docker.sock".into() }),
        };
        let report = |identity| ReportedVm { identity, erased: ErasedInfo::default(), network: None };
        let made = LaunchedVm::new("web", &record, report(Some(lies)));
        let identity = made.identity.unwrap();
        assert_eq!((made.name.as_str(), identity.nets.len()), ("web", 1));
        assert_eq!((&identity.nets[0].tap, identity.nets[0].mac), (&own.tap, own.mac));
        assert_eq!((identity.nets[0].sent_bytes, identity.vsock), (7, record.vsock()));
        // A report without devices hides none of the sockets.
        let made = LaunchedVm::new("web", &record, report(None));
        assert_eq!(made.identity.unwrap().vsock, record.vsock());
    }
}
