//! `/init`, tokens, metrics, the change of the generation, and the end.

use std::collections::BTreeMap;

use clade_agent_client::proto::api::{Generation, Init};
use clade_agent_client::{Client, ClientError, Endpoint};

use clade_test_support::wait_for;

use crate::{Agent, run, sh, shell, until};

fn status<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> u16 {
    match answer.unwrap_err() {
        ClientError::Refused { status, .. } => status,
        ClientError::Rpc(error) => error.code.status(),
        other => panic!("{other}"),
    }
}

/// A time as in RFC 3339.
fn now(offset: &str) -> String {
    let date = std::process::Command::new("date").args(["-u", "-d", offset, "+%FT%T.%NZ"]).output().unwrap();
    String::from_utf8(date.stdout).unwrap().trim().to_owned()
}

fn token(token: &str) -> Init {
    Init { access_token: Some(token.into()), ..Init::default() }
}

#[test]
fn what_init_sets_is_used() {
    let agent = Agent::start();
    let client = agent.client();
    run(async {
        let envs = BTreeMap::from([("A".to_owned(), "1".to_owned()), ("B".to_owned(), "2".to_owned())]);
        let dir = agent.dir.path().to_str().unwrap().to_owned();
        let init = Init { env_vars: Some(envs), default_workdir: Some(dir.clone()), ..Init::default() };
        client.init(&init).await.unwrap();
        let mut request = shell("echo $A $B; pwd");
        request.process.envs.insert("B".into(), "own".into());
        let done = crate::outcome(client.start(&request, None).await.unwrap()).await.unwrap();
        assert_eq!(done.stdout, format!("1 own\n{dir}\n"));
        let envs = agent.say(b"GET /envs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(envs.ends_with(r#"{"A":"1","B":"2"}"#), "{envs}");
        // Others are added, as a child of a snapshot gets its own.
        let more = BTreeMap::from([("B".to_owned(), "3".to_owned()), ("C".to_owned(), "4".to_owned())]);
        client.init(&Init { env_vars: Some(more), ..Init::default() }).await.unwrap();
        let envs = agent.say(b"GET /envs HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(envs.ends_with(r#"{"A":"1","B":"3","C":"4"}"#), "{envs}");
        let other =
            Init { env_vars: Some(BTreeMap::new()), default_user: Some("nobody-there".into()), ..Init::default() };
        client.init(&other).await.unwrap();
        assert_eq!(status(client.start(&shell("true"), None).await), 401);
    });
}

#[test]
fn an_old_init_changes_nothing() {
    let agent = Agent::start();
    let client = agent.client();
    run(async {
        let at = |time: &str, user: &str| Init {
            timestamp: Some(time.into()),
            default_user: Some(user.into()),
            ..Init::default()
        };
        client.init(&at(&now("-1 sec"), "root")).await.unwrap();
        client.init(&at(&now("-3 sec"), "nobody-there")).await.unwrap();
        sh(&client, "true").await;
        assert_eq!(status(client.init(&at("yesterday", "root")).await), 400);
    });
}

#[test]
fn a_token_keeps_others_out() {
    let agent = Agent::start();
    let open = agent.client();
    run(async {
        open.init(&token("secret")).await.unwrap();
        let owner = agent.client().with_token(Some("secret".into()));
        open.health().await.unwrap();
        assert_eq!(status(open.list().await), 401);
        assert_eq!(status(open.metrics().await), 401);
        assert_eq!(status(open.download("/etc/passwd").await), 401);
        assert_eq!(status(agent.client().with_token(Some("secreT".into())).list().await), 401);
        owner.list().await.unwrap();
        owner.download("/etc/passwd").await.unwrap();
        // Only a holder of the token may change or remove it.
        assert_eq!(status(open.init(&token("other")).await), 401);
        assert_eq!(status(open.init(&Init::default()).await), 401);
        owner.init(&token("secret")).await.unwrap();
    });
}

#[test]
fn metrics_are_numbers_of_this_host() {
    let agent = Agent::start();
    run(async {
        let metrics = agent.client().metrics().await.unwrap();
        let processors = std::thread::available_parallelism().unwrap().get();
        assert!(metrics.cpu_count as usize >= processors && metrics.ts > 1_700_000_000, "{metrics:?}");
        assert!(
            metrics.mem_used < metrics.mem_total && metrics.mem_total_mib == metrics.mem_total >> 20,
            "{metrics:?}"
        );
        assert!(metrics.disk_used <= metrics.disk_total && metrics.disk_total > 0, "{metrics:?}");
    });
}

#[test]
fn another_generation_drops_tokens_and_connections_and_no_process() {
    let agent = Agent::start();
    run(async {
        let client = agent.client();
        let mut process =
            client.start(&shell("trap 'echo hit' TERM HUP; while :; do sleep 0.1; done"), None).await.unwrap();
        client.init(&token("of the parent")).await.unwrap();
        let ready =
            client.change_generation(&Generation { name: "child".into(), ..Generation::default() }).await.unwrap();
        assert_eq!((ready.generation, ready.hooks.len()), (1, 0));
        // Only root may reseed the kernel's generator.
        assert!(ready.failed.is_empty() || std::env::var("USER").is_ok_and(|user| user != "root"), "{ready:?}");
        process.next().await.unwrap_err();
        // The token is gone, the process is not.
        let list = client.list().await.unwrap().processes;
        assert_eq!(list[0].pid, process.pid);
        client.init(&token("of the child")).await.unwrap();
        assert_eq!(client.change_generation(&Generation::default()).await.unwrap().generation, 2);
        client.signal(process.pid, clade_agent_client::proto::process::Signal::KILL).await.unwrap();
    });
}

#[test]
fn a_new_vm_that_needed_a_token_is_the_hosts_alone_until_it_has_one() {
    let agent = Agent::start_with(&["--tcp", "127.0.0.1:0"]);
    let address = format!("127.0.0.1:{}", listening_port(agent.child.id())).parse().unwrap();
    run(async {
        let (host, other) = (agent.client(), Client::new(Endpoint::Tcp(address)));
        // Without a token all clients have access, also afterwards.
        host.change_generation(&Generation::default()).await.unwrap();
        other.list().await.unwrap();
        host.init(&token("of the parent")).await.unwrap();
        for _ in 0..2 {
            host.change_generation(&Generation::default()).await.unwrap();
            assert_eq!(status(other.list().await), 401);
            assert_eq!(status(other.init(&token("of a thief")).await), 401);
            other.health().await.unwrap();
            for request in [
                "GET /envs HTTP/1.1\r\nx-access-token: of the parent",
                "GET /files?path=/etc/passwd HTTP/1.1",
                "POST /init HTTP/1.1\r\ncontent-length: 0",
            ] {
                // As the host passes it on for a client.
                let text = format!("{request}\r\nhost: x\r\nx-clade-passed-on: 1\r\nconnection: close\r\n\r\n");
                let answer = agent.say(text.as_bytes());
                assert!(answer.starts_with("HTTP/1.1 401 "), "{request}: {answer}");
            }
        }
        let passed_on = "POST /clade/shutdown HTTP/1.1\r\nhost: x\r\nx-clade-passed-on: 1\r\nconnection: close\r\n\r\n";
        assert!(agent.say(passed_on.as_bytes()).starts_with("HTTP/1.1 403 "));
        host.list().await.unwrap();
        host.init(&token("of the child")).await.unwrap();
        other.with_token(Some("of the child".to_owned())).list().await.unwrap();
    });
}

#[test]
fn only_the_host_may_ask_for_the_end() {
    let mut agent = Agent::start_with(&["--tcp", "127.0.0.1:0"]);
    // The agent does not print its port: it is found among the listening ports of its process.
    let port = listening_port(agent.child.id());
    let address = format!("127.0.0.1:{port}").parse().unwrap();
    run(async {
        let tcp = Client::new(Endpoint::Tcp(address));
        tcp.health().await.unwrap();
        assert_eq!(status(tcp.shut_down(None).await), 403);
        assert_eq!(status(tcp.change_generation(&Generation::default()).await), 403);
        let process = tcp.start(&shell("trap '' TERM; while :; do sleep 0.1; done"), None).await.unwrap();
        agent.client().shut_down(None).await.unwrap();
        until("the agent's end", async || agent.child.try_wait().unwrap().is_some()).await;
        assert!(agent.child.wait().unwrap().success());
        let left = format!("/proc/{}/exe", process.pid);
        until("the process's end", async || !std::path::Path::new(&left).exists()).await;
        assert!(!agent.socket().exists());
    });
}

fn listening_port(pid: u32) -> u16 {
    wait_for("the agent listens", || {
        let mut inodes = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let link = std::fs::read_link(entry.path()).unwrap_or_default();
            inodes
                .extend(link.to_str().unwrap().strip_prefix("socket:[").map(|it| it.trim_end_matches(']').to_owned()));
        }
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        for line in table.lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields[3] == "0A" && inodes.iter().any(|inode| inode == fields[9]) {
                return Some(u16::from_str_radix(fields[1].split_once(':').unwrap().1, 16).unwrap());
            }
        }
        None
    })
}
