//! VMs as a client sees them that may do without a supervisor: their ends, and their agents'
//! sockets.

use std::path::PathBuf;

use clade_api::http::{THREAD_PATIENCE, on_a_thread};
use clade_api::{Client, ClientError, StopAnswer, StopRequest, VmInfo, check_name};
use hyper::Method;

use crate::ends::clear_up_alone;
use crate::vm_record::vsock_known;

/// Stops a VM according to `request`. Returns when its name is free. A confined process leaves
/// its files to the supervisor; without one, they are removed here.
///
/// # Errors
/// As for any request. When the name is not free in time.
pub async fn stop(client: &Client, name: &str, request: StopRequest) -> Result<StopAnswer, ClientError> {
    match client.stop(name, request).await {
        Err(ClientError::NoSupervisor { .. }) => {}
        answer => return answer,
    }
    let (answer, left) = client.stop_process(name, request, None).await?;
    if let Some((claim, exit)) = left {
        clear_up_alone(claim, exit);
    }
    Ok(answer)
}

/// Returns the socket of the agent in the guest of `name`, from the supervisor's record. The
/// process of the VM may be compromised and name another program's socket, so it is asked only
/// if no supervisor has started it.
///
/// # Errors
/// When there is no such VM.
pub async fn agent_socket(client: &Client, name: &str) -> Result<Option<PathBuf>, ClientError> {
    check_name(name)?;
    if !client.is_remote() {
        let (dir, vm) = (client.dir().to_owned(), name.to_owned());
        let known = on_a_thread(THREAD_PATIENCE, move || vsock_known(&dir, &vm)).await;
        if let Ok(Ok(Some(known))) = known {
            return Ok(known.map(|vsock| vsock.socket));
        }
    }
    let info: VmInfo = client.request(Method::GET, name, "", None::<&()>).await?;
    Ok(info.vsock.map(|vsock| vsock.socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::{fs, thread};

    use clade_api::supervisor_path;

    use super::*;

    #[tokio::test]
    async fn a_stop_without_a_supervisor_goes_to_the_process_of_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let path = supervisor_path(dir.path());
        let listener = UnixListener::bind(&path).unwrap();
        let ending = thread::spawn(move || {
            // The request is accepted by a supervisor that ends before it reads it.
            drop(listener.accept().unwrap());
            fs::remove_file(&path).unwrap();
        });
        let refused = stop(&Client::new(dir.path()), "web", StopRequest::default()).await.unwrap_err();
        // That process does not exist.
        assert!(matches!(&refused, ClientError::NoSuchVm { name, .. } if name == "web"), "{refused:?}");
        ending.join().unwrap();
    }
}
