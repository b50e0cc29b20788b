//! libfabric's own programs, of Debian's libfabric-bin, on the emulated device.
//!
//! They need the library that is preloaded, `cargo build --release -p softefa-preload`, beside the command.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

/// `softefa run` in a directory. It becomes the command, and can be killed as such.
fn softefa(dir: &Path, options: &[&str], command: &[&str]) -> Command {
    let mut softefa = Command::new(env!("CARGO_BIN_EXE_softefa"));
    softefa.args(["run", "--dir"]).arg(dir).args(options).arg("--").args(command);
    for (name, _) in std::env::vars() {
        if name.starts_with("FI_") || name.starts_with("SOFTEFA_") {
            softefa.env_remove(name);
        }
    }
    softefa
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory in memory")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn fi_info_lists_the_nics_of_a_host() {
    for (options, nics, first) in [
        (&["--nics", "3"][..], 3, "rdmap0s0-rdm"),
        (&["--profile", "p5en"], 16, "rdmap85s0-rdm"),
        (&["--profile", "p6-b200"], 8, "rdm"),
    ] {
        let dir = directory();
        let list = ["fi_info", "-p", "efa", "-f", "efa", "-t", "FI_EP_RDM"];
        let said = text(&softefa(dir.path(), options, &list).output().expect("fi_info"));
        let mut domains: Vec<_> =
            said.lines().filter_map(|line| line.trim().strip_prefix("domain: ")).collect();
        domains.sort_unstable();
        domains.dedup();
        assert_eq!(domains.len(), nics, "{said}");
        assert!(said.contains(first), "{said}");
    }
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Both ends of fi_pingpong, with data checked (-c).
fn pingpong(port: u16, options: &[&str], arguments: &[&str]) {
    let dir = directory();
    let port = port.to_string();
    let common = [&["fi_pingpong", "-p", "efa", "-c", "-I", "200"], arguments].concat();
    let host = |number| [&["--host", number], options].concat();
    let server = softefa(dir.path(), &host("1"), &[&common[..], &["-B", &port]].concat())
        .stdout(Stdio::piped())
        .spawn()
        .expect("fi_pingpong");
    let mut server = Server(server);
    // It says nothing before its client comes: the client is tried until the server listens.
    let client = loop {
        // One that hangs ends.
        let limited =
            [&["timeout", "-s", "KILL", "60"], &common[..], &["-P", &port, "127.0.0.1"]].concat();
        let output = softefa(dir.path(), &host("0"), &limited).output().expect("fi_pingpong");
        let refused = String::from_utf8_lossy(&output.stderr).contains("Connection refused");
        if !refused || server.0.try_wait().expect("a child").is_some() {
            break output;
        }
    };
    let said = text(&client);
    assert!(said.contains("200"), "{said}");
    let lines = BufReader::new(server.0.stdout.take().expect("piped")).lines().count();
    assert!(server.0.wait().expect("a child").success());
    assert!(lines > 1);
    // Bytes went through the NICs of both hosts, by the rings and not by shared memory of libfabric's.
    let stat = Command::new(env!("CARGO_BIN_EXE_softefa"))
        .args(["stat", "--json", "--dir"])
        .arg(dir.path())
        .output()
        .expect("softefa stat");
    let nics: serde_json::Value = serde_json::from_str(&text(&stat)).expect("JSON");
    for host in [0, 1] {
        let of = |counter: &str| -> u64 {
            let all = nics.as_array().expect("an array").iter().filter(|nic| nic["host"] == host);
            all.map(|nic| nic["counters"][counter].as_u64().expect("a number")).sum()
        };
        assert!(of("sends") > 200 && of("packets") > 200, "host {host}: {nics}");
        // A packet may come before the other side has posted its receives; libfabric sends it again.
        assert!(of("errors") <= of("rnr") && of("overruns") == 0, "host {host}: {nics}");
    }
}

#[test]
fn fi_pingpong_between_two_hosts() {
    pingpong(47_311, &[], &["-e", "rdm"]);
}

#[test]
fn fi_pingpong_of_datagrams() {
    pingpong(47_312, &[], &["-e", "dgram", "-S", "1024"]);
}

#[test]
fn fi_pingpong_with_late_and_reordered_packets() {
    let dir = directory();
    let script = dir.path().join("script");
    std::fs::write(&script, "seed 3\nreorder rate=20%\ndelay by=300us rate=2%\n").expect("written");
    pingpong(47_313, &["--faults", script.to_str().expect("a text")], &["-e", "rdm"]);
}

/// The GID that a process shows, which stays until it is dropped, as its output is read until then.
fn gid(dir: &Path, command: &[&str]) -> (Server, BufReader<ChildStdout>, String) {
    let file = "/sys/class/infiniband/rdmap0s0/ports/1/gids/0";
    let words = [command, &["tail", "-f", file]].concat();
    let child = softefa(dir, &[], &words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut server = Server(child.expect("a process"));
    let mut line = String::new();
    let mut output = BufReader::new(server.0.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("text");
    (server, output, line)
}

#[test]
fn network_namespaces_are_hosts() {
    let dir = directory();
    let namespace: &[&str] = &["unshare", "-n"];
    let may = Command::new("unshare").args(["-n", "true"]).output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no leave to make a network namespace");
        return;
    }
    let (_here, _a, first) = gid(dir.path(), &[]);
    let (_too, _b, same) = gid(dir.path(), &[]);
    let (_there, _c, other) = gid(dir.path(), namespace);
    let (_elsewhere, _d, third) = gid(dir.path(), namespace);
    assert!(first.starts_with("fe80:"), "{first}");
    assert_eq!(first, same);
    assert!(first != other && other != third && first != third, "{first}{other}{third}");
}

/// A number that is none is said, and nothing goes on as another host.
#[test]
fn a_wrong_host_is_refused() {
    for (host, why) in [("one", "not a number"), ("65536", "at most 65535")] {
        let dir = directory();
        let words = ["env", &format!("SOFTEFA_HOST={host}"), "fi_info", "-p", "efa"];
        let output = softefa(dir.path(), &[], &words).output().expect("fi_info");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(&format!("SOFTEFA_HOST={host}: {why}")),
            "{said}"
        );
    }
}
