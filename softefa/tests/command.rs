//! The command `softefa`, with a library that stands for libsoftefa.so.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A folder for a test; its `cluster` is for SOFTEFA_DIR.
fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder")
}

/// A shared object that this process has and `cat` and `env` have not: harmless to preload.
fn stand_in() -> PathBuf {
    let maps = fs::read_to_string("/proc/self/maps").expect("the mappings");
    let mut paths = maps.lines().filter_map(|line| line.split_ascii_whitespace().nth(5));
    paths.find(|path| path.contains("/libgcc_s.so")).expect("a shared object").into()
}

/// `softefa` with an environment of which nothing is set but what a test sets.
fn softefa(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_softefa"));
    for name in ["HOST", "DEVICES", "PROFILE", "DATA_PATH", "COPY"] {
        command.env_remove(format!("SOFTEFA_{name}"));
    }
    for name in ["LD_PRELOAD", "FI_EFA_USE_DEVICE_RDMA", "FI_EFA_ENABLE_SHM_TRANSFER"] {
        command.env_remove(name);
    }
    command.env("SOFTEFA_DIR", folder.join("cluster")).env("SOFTEFA_LIBRARY", stand_in());
    command.current_dir(folder).args(words);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What it prints; it must succeed without a complaint.
fn prints(mut command: Command) -> String {
    let output = command.output().expect("it starts");
    assert_eq!(text(&output.stderr), "");
    assert!(output.status.success(), "{}", output.status);
    text(&output.stdout)
}

/// It refuses, for a reason given in one line.
fn assert_refused(output: &Output, status: i32, expected: &str) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.starts_with("softefa: ") && said.contains(expected), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

/// The rules of the cluster, without the age that `softefa ctl` shows.
fn rules(folder: &Path) -> Vec<String> {
    let listed = prints(softefa(folder, &["ctl"]));
    listed.lines().map(|line| line.split("  #").next().unwrap().trim().to_owned()).collect()
}

/// Lines of the environment that a command was given and that are of interest here.
fn environment(command: Command) -> Vec<String> {
    let starts = ["SOFTEFA_", "FI_", "LD_PRELOAD="];
    let printed = prints(command);
    let ours = |line: &&str| starts.iter().any(|start| line.starts_with(start));
    let mut lines: Vec<_> = printed.lines().filter(ours).map(str::to_owned).collect();
    lines.retain(|line| !line.starts_with("SOFTEFA_LIBRARY="));
    lines.sort();
    lines
}

fn write(folder: &Path, name: &str, text: &str) -> String {
    fs::write(folder.join(name), text).expect("a file");
    name.into()
}

#[test]
fn the_command_finds_its_environment() {
    let folder = folder();
    let folder = folder.path();
    let (dir, library) = (folder.join("cluster"), stand_in());
    let (dir, library) = (dir.to_str().unwrap(), library.to_str().unwrap());
    let usual = [
        "FI_EFA_ENABLE_SHM_TRANSFER=0".to_owned(),
        "FI_EFA_USE_DEVICE_RDMA=1".to_owned(),
        format!("LD_PRELOAD={library}"),
    ];
    let expect = |more: &[&str]| {
        [&usual[..], &more.iter().map(|s| s.to_string()).collect::<Vec<_>>()].concat()
    };
    let dir_line = format!("SOFTEFA_DIR={dir}");

    assert_eq!(environment(softefa(folder, &["run", "--", "env"])), expect(&[&dir_line]));
    assert_eq!(environment(softefa(folder, &["--", "env"])), expect(&[&dir_line]));
    let all =
        ["--profile", "p5en", "--host", "3", "--data-path", "direct", "--no-copy", "--", "env"];
    assert_eq!(
        environment(softefa(folder, &all)),
        expect(&[
            "SOFTEFA_COPY=0",
            "SOFTEFA_DATA_PATH=direct",
            &dir_line,
            "SOFTEFA_HOST=3",
            "SOFTEFA_PROFILE=p5en",
        ])
    );
    let mut command = softefa(folder, &["run", "--nics", "4", "--dir", "other", "--", "env"]);
    command.env("SOFTEFA_PROFILE", "p5");
    let other = format!("SOFTEFA_DIR={}", folder.join("other").display());
    assert_eq!(environment(command), expect(&["SOFTEFA_DEVICES=4", &other]));

    let mut command = softefa(folder, &["--", "env"]);
    command.env("FI_EFA_USE_DEVICE_RDMA", "0").env("FI_EFA_ENABLE_SHM_TRANSFER", "1");
    // Entries of nothing are dropped, the library is not repeated.
    command.env("LD_PRELOAD", format!("libm.so.6: {library}"));
    assert_eq!(
        environment(command),
        [
            "FI_EFA_ENABLE_SHM_TRANSFER=1",
            "FI_EFA_USE_DEVICE_RDMA=0",
            &format!("LD_PRELOAD={library}:libm.so.6"),
            &dir_line,
        ]
    );
}

#[test]
fn the_library_is_loaded_into_what_is_run() {
    let folder = folder();
    let maps = prints(softefa(folder.path(), &["--", "cat", "/proc/self/maps"]));
    assert!(maps.contains(stand_in().to_str().unwrap()), "{maps}");
}

#[test]
fn arguments_and_status_are_the_commands_own() {
    let folder = folder();
    let folder = folder.path();
    assert_eq!(prints(softefa(folder, &["--", "echo", "a  b", "--dir", "--"])), "a  b --dir --\n");
    let status = |script| softefa(folder, &["--", "sh", "-c", script]).status().unwrap();
    assert_eq!(status("exit 42").code(), Some(42));
    assert_eq!(status("kill -TERM $$").signal(), Some(15));
    let mut child = softefa(folder, &["--", "sh", "-c", "echo $$ > pid"]).spawn().unwrap();
    let pid = child.id();
    assert!(child.wait().unwrap().success());
    assert_eq!(fs::read_to_string(folder.join("pid")).unwrap().trim(), pid.to_string());
}

#[test]
fn what_cannot_be_run_is_told_as_by_a_shell() {
    let folder = folder();
    let folder = folder.path();
    let output = softefa(folder, &["run", "--", "no-such-command"]).output().unwrap();
    assert_refused(&output, 127, "cannot run no-such-command: No such file");
    write(folder, "data", "");
    let output = softefa(folder, &["run", "--", "./data"]).output().unwrap();
    assert_refused(&output, 126, "cannot run ./data: Permission denied");
}

#[test]
fn the_library_is_found_beside_the_command_or_in_lib() {
    let folder = folder();
    let folder = folder.path();
    for place in ["prefix/bin", "prefix/lib", "beside"] {
        fs::create_dir_all(folder.join(place)).unwrap();
    }
    let library = stand_in();
    fs::copy(&library, folder.join("prefix/lib/libsoftefa.so")).unwrap();
    fs::copy(&library, folder.join("beside/libsoftefa.so")).unwrap();
    for (command, preloaded) in [
        ("prefix/bin/softefa", "prefix/bin/../lib/libsoftefa.so"),
        ("beside/softefa", "beside/libsoftefa.so"),
    ] {
        // Not a copy: a file that somebody has open for writing cannot be run.
        fs::hard_link(env!("CARGO_BIN_EXE_softefa"), folder.join(command)).unwrap();
        let output = Command::new(folder.join(command))
            .args(["--dir", "cluster", "--", "sh", "-c", "echo $LD_PRELOAD"])
            .env_remove("SOFTEFA_LIBRARY")
            .env_remove("LD_PRELOAD")
            .current_dir(folder)
            .output()
            .unwrap();
        let found = PathBuf::from(text(&output.stdout).trim());
        assert_eq!(
            found.canonicalize().ok(),
            folder.join(preloaded).canonicalize().ok(),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_library_that_cannot_be_preloaded_stops_the_command() {
    let folder = folder();
    let folder = folder.path();
    write(folder, "empty.so", "");
    write(folder, "text.so", "not a library, but long enough to be one");
    fs::copy(stand_in(), folder.join("a b.so")).unwrap();
    for (library, why) in [
        ("missing.so", "the library to preload is not at missing.so; name it by SOFTEFA_LIBRARY"),
        ("empty.so", "empty.so cannot be preloaded: it is not a shared object"),
        ("text.so", "text.so cannot be preloaded: it is not a shared object"),
        ("a b.so", "a b.so cannot be preloaded: LD_PRELOAD separates its entries"),
    ] {
        let output =
            softefa(folder, &["--", "touch", "ran"]).env("SOFTEFA_LIBRARY", library).output();
        assert_refused(&output.unwrap(), 125, why);
    }
    assert!(!folder.join("ran").exists());
}

#[test]
fn faults_are_set_before_the_command_starts() {
    let folder = folder();
    let folder = folder.path();
    write(folder, "good", "seed 7\nlose at=3 # once\n\ndown nic=1\n");
    let run = |words: &[&str]| {
        let words = [&["run"], words, &["--", "sh", "-c", "cat $SOFTEFA_DIR/faults"]].concat();
        let seen = prints(softefa(folder, &words));
        seen.lines().map(|line| line.split(" set=").next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    prints(softefa(folder, &["ctl", "kill"]));
    assert_eq!(run(&["--faults", "good"]), ["seed 7", "lose at=3", "down nic=1"]);
    assert_eq!(run(&["--faults", "good", "--seed", "8"]), ["seed 8", "lose at=3", "down nic=1"]);
    assert_eq!(run(&[]), ["seed 8", "lose at=3", "down nic=1"], "they stay");
}

#[test]
fn a_bad_script_stops_before_anything_starts() {
    let folder = folder();
    let folder = folder.path();
    write(folder, "bad", "lose\nlose rat=1\n");
    let output = softefa(folder, &["--faults", "bad", "--", "touch", "ran"]).output().unwrap();
    assert_refused(&output, 2, "softefa: bad: line 2: `rat=1`: `lose` takes host, nic, qp, peer,");
    let output = softefa(folder, &["--faults", "none", "--", "touch", "ran"]).output().unwrap();
    assert_refused(&output, 125, "softefa: none: No such file");
    assert!(!folder.join("ran").exists() && !folder.join("cluster").exists());
}

#[test]
fn options_are_checked() {
    let folder = folder();
    for (words, why) in [
        (&["--profile", "p6", "--", "env"][..], "p5en"),
        (&["--nics", "33", "--", "env"], "0..=32"),
        (&["--nics", "3", "--profile", "p5", "--", "env"], "cannot be used with"),
        (&["--data-path", "both", "--", "env"], "direct"),
        (&["--seed", "3", "--", "env"], "--faults"),
        (&["--host", "65536", "--", "env"], "65536"),
        (&["run"], "COMMAND"),
        (&["--host", "1"], "COMMAND"),
        (&["ctl", "--json", "clear"], "cannot be used with"),
        (&[], "Usage: softefa"),
    ] {
        let output = softefa(folder.path(), words).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(why), "{words:?}: {said}");
    }
}

#[test]
fn help_teaches() {
    let folder = folder();
    for (words, taught) in [
        (&["--help"][..], "softefa --profile p5en -- python3"),
        (&["run", "--help"], "softefa run --faults script --seed 7"),
        (&["ctl", "--help"], "softefa ctl error status=unresp rate=0.5% host=0"),
    ] {
        let help = prints(softefa(folder.path(), words));
        assert!(help.contains(taught), "{help}");
        assert!(help.lines().all(|line| line.len() <= 120), "{help}");
    }
    let profiles = prints(softefa(folder.path(), &["profiles"]));
    assert!(profiles.contains("p5en     16 NICs of 200 Gbit/s, 8 GPUs\n"), "{profiles}");
}

#[test]
fn the_rules_of_the_help_are_rules() {
    let folder = folder();
    let help = prints(softefa(folder.path(), &["ctl", "--help"]));
    let examples: Vec<_> =
        help.lines().filter_map(|line| line.strip_prefix("  softefa ctl ")).collect();
    assert_eq!(examples.len(), 4);
    for example in &examples {
        let words: Vec<_> = ["ctl"].into_iter().chain(example.split(' ')).collect();
        assert_eq!(prints(softefa(folder.path(), &words)), "");
    }
    assert_eq!(rules(folder.path()).len(), examples.len());
}

#[test]
fn rules_are_added_listed_and_removed() {
    let folder = folder();
    let folder = folder.path();
    let ctl = |words: &str| {
        let words: Vec<_> = ["ctl"].into_iter().chain(words.split_whitespace()).collect();
        assert_eq!(prints(softefa(folder, &words)), "");
        rules(folder)
    };
    assert_eq!(rules(folder), [""; 0]);
    assert_eq!(
        ctl("error status=unresp rate=0.5% host=0"),
        ["1 error status=13 host=0 rate=0.005"]
    );
    let three = ["seed 5", "1 error status=13 host=0 rate=0.005", "2 down nic=0-1", "3 lose"];
    ctl("down nic=0,1");
    ctl("seed 4");
    ctl("lose");
    assert_eq!(ctl("seed 5"), three);
    assert_eq!(ctl("up nic=0")[2], "2 down nic=1");
    assert_eq!(ctl("clear 1"), ["seed 5", "1 down nic=1", "2 lose"]);
    assert_eq!(ctl("up"), ["seed 5", "1 lose"]);
    write(folder, "script", "rnr at=1\n# nothing\nkill");
    assert_eq!(ctl("load script"), ["1 rnr at=1", "2 kill"]);
    assert_eq!(ctl("clear"), [""; 0]);

    let mode = fs::metadata(folder.join("cluster/faults")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn json_is_for_programs() {
    let folder = folder();
    let folder = folder.path();
    prints(softefa(folder, &["ctl", "seed", "5"]));
    prints(softefa(folder, &["ctl", "down", "nic=0,1", "from=2s"]));
    let json = prints(softefa(folder, &["ctl", "--json"]));
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let rule = json["rules"][0].as_object_mut().unwrap();
    assert!(rule.remove("seconds").is_some_and(|seconds| seconds.is_u64()));
    let expected = serde_json::json!({
        "seed": 5,
        "rules": [{ "number": 1, "rule": "down nic=0-1 from=2s" }],
    });
    assert_eq!(json, expected);
}

#[test]
fn a_rule_says_when_it_was_set() {
    let folder = folder();
    let folder = folder.path();
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock exists, and `time` is ours.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
        time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
    };
    write(folder, "script", "lose set=1\n");
    // A time that somebody wrote into the rule is not when it was set here.
    for words in [&["ctl", "lose", "set=1"][..], &["ctl", "load", "script"]] {
        let before = now();
        prints(softefa(folder, words));
        let stored = fs::read_to_string(folder.join("cluster/faults")).unwrap();
        let set: u64 = stored.trim().strip_prefix("lose set=").unwrap().parse().unwrap();
        assert!((before..=now()).contains(&set), "{before} {set}");
    }
}

#[test]
fn what_ctl_refuses_changes_nothing() {
    let folder = folder();
    let folder = folder.path();
    prints(softefa(folder, &["ctl", "lose"]));
    write(folder, "bad", "lose\nerror\n");
    for (words, why) in [
        (&["eror", "status=1"][..], "softefa: `eror`: not a fault; these are error, lose,"),
        (&["clear", "2"], "softefa: clear 2: there is no rule of that number"),
        (&["clear", "0"], "softefa: clear 0: there is no rule of that number"),
        (&["clear", "1", "2"], "`clear` takes at most the number of one rule"),
        (&["load"], "`load` takes one file"),
        (&["load", "bad"], "softefa: bad: line 2: `error`: needs `status=`"),
        (&["up", "qp=1"], "`qp=1`: `up` takes host, nic"),
        (&["seed", "x"], "`seed x`: the seed must be a whole number"),
    ] {
        let output = softefa(folder, &[&["ctl"], words].concat()).output().unwrap();
        assert_refused(&output, 2, why);
    }
    let output = softefa(folder, &["ctl", "load", "none"]).output().unwrap();
    assert_refused(&output, 1, "softefa: none: No such file");
    assert_eq!(rules(folder), ["1 lose"]);
}

#[test]
fn what_is_stored_and_unreadable_can_be_replaced() {
    let folder = folder();
    let folder = folder.path();
    prints(softefa(folder, &["ctl", "lose"]));
    write(folder, "cluster/faults", "lose\nnonsense\n");
    let output = softefa(folder, &["ctl"]).output().unwrap();
    assert_refused(&output, 2, "cluster/faults: line 2: `nonsense`: not a fault");
    prints(softefa(folder, &["ctl", "clear"]));
    assert_eq!(rules(folder), [""; 0]);
}

#[test]
fn changes_at_the_same_time_lose_no_rule() {
    let folder = folder();
    let folder = folder.path();
    // So many rules that reading and writing them takes a while.
    write(folder, "many", &"lose at=1,2,3\n".repeat(2000));
    prints(softefa(folder, &["ctl", "load", "many"]));
    let children: Vec<_> = (0..16)
        .map(|i| softefa(folder, &["ctl", "kill", &format!("at={}", i + 1)]).spawn().unwrap())
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let rules = rules(folder);
    assert_eq!(rules.len(), 2016);
    for i in 0..16 {
        let kill = format!(" kill at={}", i + 1);
        assert!(rules.iter().any(|rule| rule.ends_with(&kill)), "{kill}");
    }
}
