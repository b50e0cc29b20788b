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

/// What the two-process tests run over: MEFA_TEST_PROVIDERS, or what every machine has.
fn providers() -> Vec<String> {
    let named = std::env::var("MEFA_TEST_PROVIDERS").unwrap_or_else(|_| "shm tcp".into());
    named.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn every_byte_is_checked() {
    for provider in &providers() {
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
            // Two passes of two rounds of writing and reading, and the measured one: 2 x 16 x 64 KiB
            // each.
            assert_eq!(report["verified_bytes"], (2 * 2 * 2 + 1) * 2 * 16 * 65536);
            assert_eq!(report["failed_threads"], 0);
            assert_eq!(report["target_memory"], serde_json::json!(["host"]));
        }
    }
}

#[test]
fn one_process_can_be_both_sides() {
    for provider in &providers() {
        let arguments = ["bench", "--self", "--same_process", "--json", "--verify", "--provider"];
        let output = run(&[&arguments[..], &[provider], &SMALL].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("one JSON object");
        assert_eq!(report["verified_bytes"], (2 * 2 * 2 + 1) * 2 * 16 * 65536);
        assert_eq!(report["same_process"], true);
        assert!(report["target_cpu_s"].is_null(), "{report}");
    }
}

#[test]
fn without_a_gpu_nothing_begins() {
    for arguments in [
        &["--self", "--use_vram"][..],
        &["--self", "--use-vram", "--gpu-id=-1", "--json"],
        &["--self", "--use_vram=true", "--gpu_id", "0", "--vram_side", "target"],
        &["--mode", "target", "--use_vram"],
        &["--idle", "60", "--use_vram"],
        &["--segment_id", "127.0.0.1:1", "--use_vram", "--gpu_id", "1"],
    ] {
        // No GPU, whatever there is.
        let output = command(&[&["bench", "--provider", "tcp"], arguments].concat())
            .env("CUDA_VISIBLE_DEVICES", "")
            .output()
            .expect("it runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let said = text(&output.stderr);
        assert!(said.starts_with("mooncake-efa: --use_vram: "), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?}: {}", text(&output.stdout));
    }
    let arguments = ["bench", "--self", "--use_vram=false", "--gpu_id=3", "--provider", "tcp"];
    let output = run(&[&arguments[..], &SMALL].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn help_tells_of_gpus() {
    let output = run(&["bench", "--help"]);
    assert!(output.status.success());
    let said = text(&output.stdout);
    for part in
        ["--use_vram", "--gpu_id <N|-1>", "--target_gpu_id", "--vram_side", "--same_process"]
    {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn bad_input_is_named() {
    let cases: [(&[&str], i32, &str); 12] = [
        (&["bench", "--self", "--block_size", "1G"], 2, "largest block that fits is 174762"),
        (&["bench", "--threads", "0"], 2, "0 is not in 1..="),
        (&["bench", "--block_size", "many"], 2, "a number of bytes"),
        (&["bench"], 2, "--segment_id"),
        (&["bench", "--self", "--segment_id", "a:1"], 2, "cannot be used with"),
        (&["bench", "--provider", "tcp", "--segment_id", "127.0.0.1:1"], 1, "cannot reach"),
        (&["bench", "--self", "--provider", "nonsense"], 1, "No devices found"),
        (&["bench", "--self", "--use_vram", "--gpu_id=-2"], 2, "-2 is not in -1..="),
        (&["bench", "--self", "--gpu_id=0"], 2, "--use_vram"),
        (&["bench", "--self", "--vram_side", "target"], 2, "--use_vram"),
        (&["bench", "--use_vram", "--target_gpu_id", "1"], 2, "--self"),
        (&["bench", "--same_process"], 2, "--self"),
    ];
    for (arguments, status, expected) in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}");
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
    assert!(rows[0]["near"].is_array() && rows[0].get("numa").is_some(), "{rows}");
    let output = run(&["devices", "--provider", "tcp", "--topology"]);
    let matrix: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(matrix["cpu:0"][0].as_array().is_some_and(|near| !near.is_empty()), "{matrix}");
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
fn a_target_serves_so_many_and_no_nonsense() {
    use std::io::Write;
    use std::net::TcpStream;
    let (mut target, address) = target();
    let connect = || BufReader::new(TcpStream::connect(&address).expect("it listens"));
    let hear = |connection: &mut BufReader<TcpStream>| {
        let mut line = String::new();
        connection.read_line(&mut line).map_or(0, |_| line.len())
    };
    // A place is free a moment after its connection was closed.
    let served = || {
        let limit = Instant::now() + Duration::from_secs(60);
        loop {
            let mut connection = connect();
            if hear(&mut connection) > 100 {
                return connection;
            }
            assert!(Instant::now() < limit, "nobody is served");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    // What is no order ends the conversation, however long it is.
    for nonsense in ["7\n".to_owned(), "\"Fill\"\n".to_owned(), "x".repeat(100_000)] {
        let mut connection = served();
        // It may be closed before it has taken all of it.
        let _ = connection.get_mut().write_all(nonsense.as_bytes());
        assert_eq!(hear(&mut connection), 0, "{nonsense:.20}");
    }
    let mut all: Vec<_> = (0..64).map(|_| served()).collect();
    assert_eq!(hear(&mut connect()), 0, "one too many is turned away");
    // When some are gone, others are served.
    all.truncate(32);
    drop(served());
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
    let output =
        run(&["bench", "--idle", "1", "--provider", "tcp", "--buffer_size", "1M", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["idle_cpu_s"].as_f64().is_some(), "{report}");
}

/// A bench of ten minutes that runs both sides, and its target's process.
fn long_run(provider: &str) -> (Child, u32) {
    let mut long = SMALL;
    long[3] = "600";
    let bench = command(&["bench", "--self", "--json", "--provider", provider])
        .args(long)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let children = format!("/proc/{0}/task/{0}/children", bench.id());
    let limit = Instant::now() + Duration::from_secs(60);
    let target = loop {
        let children = std::fs::read_to_string(&children).expect("alive");
        if let Some(child) = children.split_whitespace().next() {
            break child.parse().expect("a process id");
        }
        assert!(Instant::now() < limit, "no target process");
        std::thread::sleep(Duration::from_millis(10));
    };
    // Both are ready soon after; what comes next must work in any case.
    std::thread::sleep(Duration::from_millis(700));
    (bench, target)
}

fn signal(name: &str, process: u32) {
    let sent = Command::new("sh").args(["-c", &format!("kill -{name} {process}")]).status();
    assert!(sent.expect("a shell").success());
}

/// Removes what a killed process leaves: libfabric's shm provider keeps 16 MiB in a file for each.
fn clean_up(process: u32) {
    for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&format!("{process}:")) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn assert_gone(process: u32) {
    let limit = Instant::now() + Duration::from_secs(60);
    let alive = || {
        // One that nobody has waited for yet, as in a container without an init, is dead too.
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
    };
    while alive() {
        assert!(Instant::now() < limit, "process {process} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_interrupt_ends_the_run_with_what_was_measured() {
    let (bench, target) = long_run("tcp");
    signal("INT", bench.id());
    let output = bench.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(report["seconds"].as_f64() < Some(600.0) && report["failed_threads"] == 0, "{report}");
    assert_gone(target);
}

#[test]
fn a_run_that_is_killed_leaves_no_target() {
    for provider in &providers() {
        let (mut bench, target) = long_run(provider);
        bench.kill().expect("killed");
        bench.wait().expect("dead");
        assert_gone(target);
        clean_up(bench.id());
        clean_up(target);
    }
}

#[test]
fn a_run_whose_target_is_killed_ends() {
    for provider in &providers() {
        let (bench, target) = long_run(provider);
        let initiator = bench.id();
        signal("KILL", target);
        let start = Instant::now();
        let output = bench.wait_with_output().expect("it ends");
        assert_eq!(output.status.code(), Some(1), "{provider}: {}", text(&output.stderr));
        // Well before the transfers' own deadline of 30 seconds: it is noticed.
        assert!(start.elapsed() < Duration::from_secs(25), "{provider}: {:?}", start.elapsed());
        assert_gone(target);
        clean_up(initiator);
        clean_up(target);
    }
}
