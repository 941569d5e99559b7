//! Load: a file of a GiB, a thousand processes, output that floods.

use bytes::Bytes;
use clade_agent_client::proto::process::Signal;

use crate::{Agent, run, shell, until};

const MIB: usize = 1 << 20;
/// Limit of the agent's memory under any load, in KiB.
const MEMORY: u64 = 32 << 10;

#[test]
fn a_file_of_a_gib_passes_through_little_memory() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let path = agent.path("large");
        let piece = Bytes::from((0..MIB).map(|at| (at % 251) as u8).collect::<Vec<_>>());
        let (mut upload, call) = client.upload(&path, Some(0o600));
        let call = tokio::spawn(call);
        let mut most = 0;
        for number in 0..1024 {
            assert!(upload.send(piece.clone()).await);
            if number % 64 == 0 {
                most = most.max(agent.memory());
            }
        }
        drop(upload);
        call.await.unwrap().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 30);
        let mut download = client.download(&path).await.unwrap();
        assert_eq!(download.length, Some(1 << 30));
        let mut at = 0;
        while let Some(bytes) = download.next().await.unwrap() {
            // The pattern begins anew with each MiB.
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let from = at % MIB;
                let length = rest.len().min(MIB - from);
                assert!(rest[..length] == piece[from..from + length], "at {at}");
                (at, rest) = (at + length, &rest[length..]);
            }
            if at % (64 * MIB) < bytes.len() {
                most = most.max(agent.memory());
            }
        }
        assert_eq!(at, 1 << 30);
        println!("the agent had {most} KiB at most");
        assert!(most < MEMORY, "{most} KiB");
    });
}

#[test]
fn output_of_many_mib_comes_whole_and_in_order() {
    const LINES: u32 = 8_000_000;
    const STEP: usize = 8 * MIB;
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let mut process = client.start(&shell(&format!("seq 1 {LINES}")), None).await.unwrap();
        let (mut total, mut sum, mut most, mut looks) = (0, 0u64, 0, 0);
        while let Some(event) = process.next().await.unwrap() {
            let Some(bytes) = event.data.and_then(|data| data.stdout) else { continue };
            // This checksum depends on the order.
            sum = bytes.0.iter().fold(sum, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)));
            total += bytes.0.len();
            if total % STEP < bytes.0.len() {
                looks += 1;
                most = most.max(agent.memory());
            }
        }
        let (mut wanted, mut length) = (0u64, 0);
        for number in 1..=LINES {
            let line = format!("{number}\n");
            wanted = line.bytes().fold(wanted, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
            length += line.len();
        }
        assert_eq!((total, sum, looks), (length, wanted, length / STEP));
        assert!(most < MEMORY, "{most} KiB");
    });
}

#[test]
fn a_thousand_processes_are_followed_at_once() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let mut processes = Vec::new();
        for number in 0..1000 {
            let script = format!("echo {number}; exec sleep 1000");
            processes.push(client.start(&shell(&script), None).await.unwrap());
        }
        assert_eq!(client.list().await.unwrap().processes.len(), 1000);
        for (number, process) in processes.iter_mut().enumerate() {
            let first = process.next().await.unwrap().unwrap().data.unwrap().stdout.unwrap().0;
            assert_eq!(String::from_utf8(first).unwrap(), format!("{number}\n"));
        }
        println!("the agent has {} KiB with a thousand processes", agent.memory());
        assert!(agent.memory() < 2 * MEMORY, "{} KiB", agent.memory());
        for process in &processes {
            client.signal(process.pid, Signal::TERM).await.unwrap();
        }
        for process in processes {
            assert_eq!(crate::outcome(process).await.unwrap().end.status, "signal: terminated");
        }
        until("the list", async || client.list().await.unwrap().processes.is_empty()).await;
    });
}
