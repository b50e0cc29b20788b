//! `mooncake-efa run`, with a library that only says that it is there.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const SWAP: &str = "libmooncake_efa_swap.so";
/// What the library says where it is loaded.
const SWAPPED: &str = "swapped here\n";

/// An empty folder with the library and one more, and what `script` makes there. A shell writes
/// everything: a file that this process has open for writing could not be run by other tests.
fn folder(name: &str, script: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("run").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    let libraries = r#"
cc -shared -fPIC -x c -o libmooncake_efa_swap.so - <<'END'
#include <unistd.h>
__attribute__((constructor)) static void here(void) {
    if (write(2, "swapped here\n", 13) != 13) _exit(1);
}
END
echo 'int nothing;' | cc -shared -fPIC -x c -o other.so -
"#;
    let made = Command::new("sh")
        .args(["-ec", &format!("{libraries}\n{script}")])
        .current_dir(&folder)
        .status();
    assert!(made.expect("a shell").success(), "{script}");
    folder
}

/// `mooncake-efa run` in a folder, with its library.
fn command(folder: &Path, options: &[&str], command: &[&str]) -> Command {
    let mut run = Command::new(env!("CARGO_BIN_EXE_mooncake-efa"));
    run.current_dir(folder).env_remove("LD_PRELOAD").env_remove("MC_LOG_LEVEL");
    for name in ["MC_EFA_PROVIDER", "MC_EFA_LIBFABRIC", "MC_EFA_SWAP_FALLBACK"] {
        run.env_remove(name);
    }
    run.env("MC_EFA_SWAP", folder.join(SWAP)).arg("run").args(options).arg("--").args(command);
    run
}

fn run(folder: &Path, options: &[&str], words: &[&str]) -> Output {
    command(folder, options, words).output().expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The command was not started, for a reason given in one line.
fn assert_refused(output: &Output, status: i32, expected: &str) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.contains(expected), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

/// Lines `MC_...` and `LD_PRELOAD` of the environment that the command prints.
fn seen(output: &Output) -> Vec<String> {
    let stdout = text(&output.stdout);
    let ours = |line: &&str| line.starts_with("MC_") || line.starts_with("LD_PRELOAD=");
    let mut lines: Vec<String> = stdout.lines().filter(ours).map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn the_library_is_loaded_and_named() {
    let folder = folder("loaded", "");
    let library = folder.join(SWAP);
    let output = run(&folder, &[], &["echo", "a  b", "--quiet"]);
    assert_eq!(text(&output.stdout), "a  b --quiet\n");
    let said = text(&output.stderr);
    let version = env!("CARGO_PKG_VERSION");
    let line = format!("mooncake-efa {version}: preloads {} into /", library.display());
    assert!(said.starts_with(&line) && said.ends_with(&format!("/echo\n{SWAPPED}")), "{said}");
    let output = run(&folder, &["--quiet"], &["echo"]);
    assert_eq!(text(&output.stderr), SWAPPED);
}

#[test]
fn the_command_sees_what_was_asked_for() {
    let folder = folder("environment", "");
    let library = format!("LD_PRELOAD={}", folder.join(SWAP).display());
    let swap = format!("MC_EFA_SWAP={}", folder.join(SWAP).display());
    let plain = seen(&command(&folder, &[], &["env"]).env("MC_OTHER", "kept").output().unwrap());
    assert_eq!(plain, [&library, &swap, "MC_OTHER=kept"]);
    let options = ["--provider", "tcp", "--libfabric", "libfabric.so.1", "--log-level", "warning"];
    let output = command(&folder, &[&options[..], &["--fallback"]].concat(), &["env"])
        .env("MC_EFA_PROVIDER", "another")
        .output();
    let expected = [
        &library,
        "MC_EFA_LIBFABRIC=libfabric.so.1",
        "MC_EFA_PROVIDER=tcp",
        &swap,
        "MC_EFA_SWAP_FALLBACK=1",
        "MC_LOG_LEVEL=WARNING",
    ];
    assert_eq!(seen(&output.expect("it runs")), expected);
}

#[test]
fn what_is_preloaded_already_stays_and_the_library_comes_first_and_once() {
    let folder = folder("preload", &format!("ln -s {SWAP} link.so"));
    let [library, other, link] =
        [SWAP, "other.so", "link.so"].map(|name| folder.join(name).display().to_string());
    for (before, expected) in [
        (other.clone(), format!("{library}:{other}")),
        (format!("{other}:{library}"), format!("{library}:{other}")),
        (format!("{link} {other}:"), format!("{library}:{other}")),
        (library.clone(), library.clone()),
        (String::new(), library.clone()),
    ] {
        let output = command(&folder, &[], &["env"]).env("LD_PRELOAD", &before).output();
        let preload = seen(&output.expect("it runs")).swap_remove(0);
        assert_eq!(preload, format!("LD_PRELOAD={expected}"), "{before}");
    }
}

#[test]
fn the_exit_status_is_the_commands() {
    let folder = folder("status", "");
    for status in [0, 1, 42, 127] {
        let output = run(&folder, &[], &["sh", "-c", &format!("exit {status}")]);
        assert_eq!(output.status.code(), Some(status));
    }
}

#[test]
fn a_signal_reaches_the_command_and_its_status_comes_back() {
    let folder = folder("signal", "");
    // Holds no pipe of ours: where this fails, it stays behind for its two minutes.
    let mut child = command(&folder, &[], &["sleep", "120"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it runs");
    // Its process is the one that we started.
    let (name, limit) =
        (format!("/proc/{}/comm", child.id()), Instant::now() + Duration::from_secs(60));
    while std::fs::read_to_string(&name).expect("alive") != "sleep\n" {
        assert!(Instant::now() < limit, "it does not become the command");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("sh").args(["-c", &format!("kill -TERM {}", child.id())]).status();
    assert!(sent.expect("a shell").success());
    assert_eq!(child.wait().expect("it ends").signal(), Some(15));
}

#[test]
fn the_library_is_found_beside_the_command_and_in_its_prefix() {
    let build = "target/debug/mooncake-efa";
    for (executable, place) in [
        ("bin/mooncake-efa", "bin"),
        ("bin/mooncake-efa", "lib"),
        ("bin/mooncake-efa", "lib64"),
        ("bin/mooncake-efa", &format!("lib/{}-linux-gnu", std::env::consts::ARCH)),
        (build, "build"),
        (build, "build/adapter"),
    ] {
        let script = format!(
            "mkdir -p {place} $(dirname {executable}); mv {SWAP} {place}; cp {} {executable}",
            env!("CARGO_BIN_EXE_mooncake-efa")
        );
        let folder = folder(&format!("found-{}", place.replace('/', "-")), &script);
        let run = |options: &[&str]| {
            let mut run = Command::new(folder.join(executable));
            run.env("MC_EFA_SWAP", "").env_remove("LD_PRELOAD").arg("run").args(options);
            run.args(["--", "env"]).output().expect("it runs")
        };
        let expected = format!("LD_PRELOAD={}", folder.join(place).join(SWAP).display());
        assert_eq!(seen(&run(&[]))[0], expected);
        // What is named is taken, and nothing else.
        assert_refused(&run(&["--library", "/no/such.so"]), 125, "not at /no/such.so;");
        std::fs::remove_file(folder.join(place).join(SWAP)).expect("removed");
        let output = run(&[]);
        assert_refused(&output, 125, &folder.join(place).join(SWAP).display().to_string());
    }
}

#[test]
fn a_library_that_cannot_be_preloaded_is_refused() {
    // 243 is RISC-V.
    let script = format!(
        "echo text > text.so; cp {SWAP} 'a b.so'; cp /bin/true program.so; cp {SWAP} foreign.so
        printf '\\363\\0' | dd of=foreign.so bs=1 seek=18 conv=notrunc 2> dd.log"
    );
    let folder = folder("unfit", &script);
    for (library, expected) in [
        ("missing.so", "not at missing.so"),
        ("text.so", "text.so cannot be preloaded: it is not a 64-bit ELF file"),
        ("a b.so", "separates its entries by spaces"),
        ("program.so", "it is not a shared object"),
        ("foreign.so", "it is for riscv64"),
    ] {
        // The option goes before the variable.
        let output = run(&folder, &["--library", library, "--fallback"], &["echo"]);
        assert_refused(&output, 125, expected);
    }
}

#[test]
fn a_command_is_found_as_a_shell_finds_it() {
    let folder = folder(
        "lookup",
        "mkdir first second
        echo 'echo none' > first/both; echo 'echo second' > second/both; chmod +x second/both
        echo none > second/text
        printf '#!/no/such/interpreter\n' > lost; chmod +x lost",
    );
    let path = format!("{0}/first:{0}/second:/bin:/usr/bin", folder.display());
    let run = |words: &[&str]| {
        command(&folder, &["--fallback"], words).env("PATH", &path).output().expect("it runs")
    };
    assert_eq!(text(&run(&["both"]).stdout), "second\n");
    assert_eq!(text(&run(&["second/both"]).stdout), "second\n");
    for (name, status, expected) in [
        ("no-such-command", 127, "there is no command no-such-command"),
        ("./no-such-command", 127, "there is no command ./no-such-command"),
        ("text", 126, "second/text is not an executable file"),
        ("second/text", 126, "second/text is not an executable file"),
        ("/", 126, "/ is not an executable file"),
    ] {
        assert_refused(&run(&[name]), status, expected);
    }
    let strict = command(&folder, &[], &["./lost"]).output().expect("it runs");
    assert_refused(&strict, 127, "./lost needs an interpreter, and there is no command /no/such");
    assert_eq!(run(&["./lost"]).status.code(), Some(127));
}

/// Refused without `--fallback`; with it, started after a warning. Returns what came then.
fn assert_only_by_fallback(folder: &Path, name: &str, status: i32, expected: &str) -> Output {
    assert_refused(&run(folder, &[], &[name]), status, expected);
    let output = run(folder, &["--fallback"], &[name]);
    let said = text(&output.stderr);
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].contains(expected) && lines[0].ends_with("going on, as --fallback asks"));
    assert!(lines[1].contains(": preloads "), "{said}");
    output
}

#[test]
fn a_static_program_is_only_run_by_fallback() {
    // Traps, as that takes no C library.
    let script = "echo 'void _start(void) { __builtin_trap(); }' |
        cc -static -nostdlib -x c -o program -
        printf '#!./program\n' > script; chmod +x script";
    let folder = folder("static", script);
    for name in ["./program", "./script"] {
        let output = assert_only_by_fallback(&folder, name, 120, "./program is statically linked");
        assert!(output.status.signal().is_some(), "{:?}", output.status);
    }
}

const MOONCAKE: &str = "
    echo 'const char mooncake[] = \"N8mooncake12EfaTransportE\"; int main(void) { return 7; }' > in.c
    cc -o inside in.c
    echo 'const char _ZTSN8mooncake12EfaTransportE[] = \"N8mooncake12EfaTransportE\";
        int main(void) { return 7; }' | cc -rdynamic -x c -o exported -";

#[test]
fn a_mooncake_that_is_compiled_in_is_only_run_by_fallback() {
    let scripts = "
        printf '#!./inside\n' > script
        printf '#! /usr/bin/env -S A=b ./inside -x\n' > env; chmod +x script env";
    let folder = folder("inside", &format!("{MOONCAKE}\n{scripts}"));
    let expected = "Mooncake is linked into ./inside statically";
    for name in ["./inside", "./script", "./env"] {
        let output = assert_only_by_fallback(&folder, name, 121, expected);
        assert_eq!(output.status.code(), Some(7));
        assert!(text(&output.stderr).contains(SWAPPED));
    }
    let output = run(&folder, &["--quiet"], &["./exported"]);
    assert_eq!((output.status.code(), &text(&output.stderr)[..]), (Some(7), SWAPPED));
}

#[test]
fn a_setuid_program_is_only_run_by_fallback() {
    let folder = folder("setuid", "echo 'int main(void) { return 7; }' | cc -x c -o program -");
    let program = folder.join("program");
    if let Err(why) = std::os::unix::fs::chown(&program, Some(65534), None) {
        eprintln!("skipped: no file of another user can be made here: {why}");
        return;
    }
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o4755)).expect("setuid");
    let output = assert_only_by_fallback(&folder, "./program", 122, "./program is setuid");
    assert_eq!(output.status.code(), Some(7));
}

#[test]
fn a_program_for_another_machine_is_refused() {
    let script = "cp /bin/true program
        printf '\\363\\0' | dd of=program bs=1 seek=18 conv=notrunc 2> dd.log";
    let folder = folder("foreign", script);
    assert_refused(&run(&folder, &[], &["./program"]), 123, "it is for riscv64");
}

#[test]
fn a_dry_run_tells_and_starts_nothing() {
    let folder = folder("dry", MOONCAKE);
    let plan = |options: &[&str], words: &[&str]| {
        let output = run(&folder, &[&["--dry-run", "--json"], options].concat(), words);
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(plan["status"].as_i64(), output.status.code().map(i64::from));
        assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
        plan
    };
    let good = plan(&["--provider", "tcp"], &["touch", "made"]);
    assert_eq!(good["status"], 0);
    assert_eq!(good["environment"]["LD_PRELOAD"], folder.join(SWAP).display().to_string());
    assert_eq!(good["environment"]["MC_EFA_PROVIDER"], "tcp");
    assert!(good["program"].as_str().is_some_and(|program| program.ends_with("/touch")), "{good}");
    assert_eq!(good["arguments"][0], "made");
    assert!(!folder.join("made").exists());

    let inside = plan(&[], &["./inside"]);
    assert_eq!(inside["status"], 121);
    assert_eq!(inside["checks"][2]["check"], "swap");
    assert_eq!(inside["checks"][2]["good"], false);
    let fallback = plan(&["--fallback"], &["./inside"]);
    assert_eq!((&fallback["status"], &fallback["checks"][2]["status"]), (&0.into(), &121.into()));
    let missing = plan(&[], &["no-such-command"]);
    assert_eq!((&missing["status"], &missing["program"]), (&127.into(), &().into()));
    assert_eq!(plan(&["--library", "missing.so"], &["touch", "made"])["status"], 125);

    let output = run(&folder, &["--dry-run"], &["./inside", "a b"]);
    assert_eq!(output.status.code(), Some(121));
    let told = text(&output.stdout);
    for expected in [
        "set    LD_PRELOAD=/",
        "run    ./inside [\"a b\"]",
        "check  library: good",
        "check  swap: Mooncake is linked into",
    ] {
        assert!(told.contains(expected), "{told}");
    }
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
}

#[test]
fn bad_usage_is_named() {
    let folder = folder("usage", "");
    for (options, expected) in [
        (&["--log-level", "loud"][..], "[possible values: TRACE, INFO, WARNING, ERROR]"),
        (&["--json"], "--dry-run"),
    ] {
        let output = run(&folder, options, &["echo"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
    }
    assert_eq!(run(&folder, &[], &[]).status.code(), Some(2));
}
