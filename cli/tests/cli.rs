//! The command as a person runs it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SMALL: [&str; 8] =
    ["--threads", "2", "--duration", "1", "--buffer_size", "8M", "--batch_size", "16"];

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mooncake-efa"));
    command.args(arguments).env_remove("MC_EFA_PROVIDER");
    command
}

fn run(arguments: &[&str]) -> Output {
    command(arguments).output().expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn every_byte_is_checked_over_shm_and_tcp() {
    for provider in ["shm", "tcp"] {
        for operation in ["write", "read"] {
            let arguments =
                ["bench", "--self", "--json", "--verify", "--provider", provider, "--operation"];
            let output = run(&[&arguments[..], &[operation], &SMALL].concat());
            assert!(output.status.success(), "{}", text(&output.stderr));
            let report: serde_json::Value =
                serde_json::from_slice(&output.stdout).expect("one JSON object");
            assert!(report["provider"].as_str().expect("text").starts_with(provider));
            assert_eq!(report["operation"], operation);
            assert!(report["ops"].as_u64() > Some(0), "{report}");
            // Two passes of writing and reading, and the measured one: 2 x 16 x 64 KiB each.
            assert_eq!(report["verified_bytes"], 5 * 2 * 16 * 65536);
            assert_eq!(report["failed_threads"], 0);
        }
    }
}

#[test]
fn bad_input_is_named() {
    let cases: [(&[&str], &str); 6] = [
        (&["bench", "--block_size", "1G"], "largest block that fits is"),
        (&["bench", "--threads", "0"], "at least 1"),
        (&["bench", "--block_size", "many"], "a number of bytes"),
        (&["bench"], "--segment_id"),
        (&["bench", "--provider", "tcp", "--segment_id", "127.0.0.1:1"], "cannot reach the target"),
        (&["bench", "--self", "--provider", "nonsense"], "No devices found"),
    ];
    for (arguments, expected) in cases {
        let output = run(arguments);
        assert!(!output.status.success(), "{arguments:?}");
        let said = text(&output.stderr);
        assert!(said.contains(expected), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    }
}

#[test]
fn devices_are_listed_or_missed_by_name() {
    let output = run(&["devices", "--provider", "tcp", "--json"]);
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(rows[0]["transmit_depth"].as_u64() > Some(0), "{rows}");
    let output = run(&["devices"]);
    if output.status.success() {
        eprintln!("skipped: this host has EFA devices");
        return;
    }
    let said = text(&output.stderr);
    assert!(said.contains("No EFA devices found") && said.contains("MC_EFA_PROVIDER"), "{said}");
}

/// A target, ready.
fn target() -> (Child, String) {
    let mut child = command(&["bench", "--mode", "target", "--provider", "tcp"])
        .args(SMALL)
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let address = line.trim_end().strip_prefix("target ready: ").expect("ready").to_owned();
    (child, address)
}

#[test]
fn two_hosts_one_after_the_other() {
    let (mut target, address) = target();
    for _ in 0..2 {
        let arguments = ["bench", "--provider", "tcp", "--segment_id", &address, "--verify"];
        let output = run(&[&arguments[..], &SMALL].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains("0 wrong"), "{}", text(&output.stdout));
    }
    let other =
        run(&[&["bench", "--provider", "shm", "--segment_id", &address], &SMALL[..]].concat());
    assert!(!other.status.success());
    assert!(text(&other.stderr).contains("MC_EFA_PROVIDER"), "{}", text(&other.stderr));
    target.kill().expect("killed");
    target.wait().expect("dead");
}

#[test]
fn a_dead_target_is_an_error_not_a_hang() {
    let (mut target, address) = target();
    let mut long = SMALL;
    long[3] = "600";
    let initiator = command(&["bench", "--provider", "tcp", "--segment_id", &address])
        .args(long)
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it runs");
    // Transfers are under way when the target has used some CPU time beyond its start.
    let busy = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", target.id())).expect("alive");
        let fields: Vec<&str> = stat.rsplit(' ').collect();
        let ticks = |index: usize| fields[fields.len() - index].parse::<u64>().expect("ticks");
        ticks(14) + ticks(15)
    };
    let (start, limit) = (busy(), Instant::now() + Duration::from_secs(60));
    while busy() < start + 10 {
        assert!(Instant::now() < limit, "the target is never busy");
        std::thread::sleep(Duration::from_millis(10));
    }
    target.kill().expect("killed");
    target.wait().expect("dead");
    let output = initiator.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("transfers failed"), "{}", text(&output.stderr));
}

#[test]
fn an_idle_transport_reports_its_cpu_time() {
    let output = run(&[
        "bench",
        "--idle",
        "1",
        "--provider",
        "tcp",
        "--buffer_size",
        "1M",
        "--json",
        "--block_size",
        "1",
        "--threads",
        "1",
    ]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["idle_cpu_s"].as_f64().is_some(), "{report}");
}
