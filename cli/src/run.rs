//! `mooncake-efa run`: a published Mooncake on our transport, by a preloaded library.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::builder::PossibleValuesParser;
use memchr::memmem;
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Object, ObjectKind, ObjectSegment, ObjectSymbol, elf};
use rustix::fs::{Access, access, getxattr};
use rustix::process::{getgid, getuid};

const LIBRARY: &str = "libmooncake_efa_swap.so";
/// In the mangled name of every function and the type information of Mooncake's transport.
const MANGLED: &[u8] = b"N8mooncake12EfaTransport";

const STATIC: u8 = 120;
const MOONCAKE_INSIDE: u8 = 121;
const PRIVILEGED: u8 = 122;
const FOREIGN: u8 = 123;
/// As of `env` and `timeout`: the wrapper itself cannot.
const NO_LIBRARY: u8 = 125;
/// These two as of every shell.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

const HELP: &str = r#"Examples:
  mooncake-efa run -- vllm serve MODEL --kv-transfer-config \
      '{"kv_connector":"MooncakeConnector","kv_role":"kv_producer"}'
  mooncake-efa run -- python3 -m sglang.launch_server --model-path MODEL \
      --disaggregation-mode prefill
  mooncake-efa run --dry-run -- vllm serve MODEL    what would be set and run, and whether it can work

To see that it runs: where Mooncake installs its efa transport, the log says
  mooncake-efa VERSION serves protocol efa in ...
To go back: leave `mooncake-efa run --` out.

What COMMAND starts gets the library too; only COMMAND, or a script's interpreter, is checked.

Exit status: COMMAND's own, or, with nothing started (--fallback goes on after the first four),
  120  COMMAND is statically linked: nothing can be preloaded into it
  121  Mooncake is compiled into COMMAND: it must be rebuilt with the CMake drop-in
  122  COMMAND is setuid, setgid or has file capabilities: LD_PRELOAD is ignored
  123  COMMAND is for another architecture
  125  the library was not found, or cannot be preloaded
  126  COMMAND is not executable
  127  COMMAND was not found"#;

/// Flags of `mooncake-efa run`.
#[derive(clap::Args)]
#[command(override_usage = "mooncake-efa run [OPTIONS] -- COMMAND [ARGS]...", after_help = HELP)]
pub struct Args {
    /// The library to preload (default: MC_EFA_SWAP, or libmooncake_efa_swap.so near this command)
    #[arg(long, value_name = "PATH")]
    library: Option<PathBuf>,
    /// libfabric's provider: sets MC_EFA_PROVIDER
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// The libfabric to load: sets MC_EFA_LIBFABRIC
    #[arg(long, value_name = "PATH")]
    libfabric: Option<OsString>,
    /// What Mooncake and the library log: sets MC_LOG_LEVEL
    #[arg(long, value_name = "LEVEL", ignore_case = true)]
    #[arg(value_parser = PossibleValuesParser::new(["TRACE", "INFO", "WARNING", "ERROR"]))]
    log_level: Option<String>,
    /// Where the transport cannot be swapped, go on with Mooncake's own instead of failing: sets
    /// MC_EFA_SWAP_FALLBACK=1
    #[arg(long)]
    fallback: bool,
    /// Do not say what is preloaded into what
    #[arg(long)]
    quiet: bool,
    /// Start nothing; print what would be set and run, and what the checks found
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: one JSON object
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// What to run, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Why it cannot work, and the exit status for that.
struct Obstacle {
    status: u8,
    why: String,
}

fn obstacle<T>(status: u8, why: String) -> Result<T, Obstacle> {
    Err(Obstacle { status, why })
}

/// What would be set and run, and whether that can work.
struct Plan {
    library: Option<PathBuf>,
    environment: Vec<(&'static str, OsString)>,
    program: Option<PathBuf>,
    checks: Vec<(&'static str, Option<Obstacle>)>,
    /// 0, or that of the first check that stands in the way.
    status: u8,
}

/// Becomes the command; returns only if that is impossible or was not asked for.
pub fn run(args: &Args) -> ExitCode {
    let plan = plan(args);
    if args.dry_run {
        print(&plan, args);
        return ExitCode::from(plan.status);
    }
    for (check, obstacle) in &plan.checks {
        if let Some(Obstacle { why, .. }) = obstacle {
            let goes_on = if stops(check, args) { "" } else { "; going on, as --fallback asks" };
            eprintln!("mooncake-efa: {why}{goes_on}");
        }
    }
    let (Some(library), Some(program), 0) = (plan.library, plan.program, plan.status) else {
        return ExitCode::from(plan.status);
    };
    if !args.quiet {
        let (version, library) = (env!("CARGO_PKG_VERSION"), library.display());
        eprintln!("mooncake-efa {version}: preloads {library} into {}", program.display());
    }
    // Not a child that we wait for: as this process becomes the command, its signals, process id,
    // terminal and exit status are the command's by construction.
    let why = Command::new(&program)
        .arg0(&args.command[0])
        .args(&args.command[1..])
        .envs(plan.environment)
        .exec();
    eprintln!("mooncake-efa: cannot run {}: {why}", program.display());
    let missing = why.kind() == io::ErrorKind::NotFound;
    ExitCode::from(if missing { NOT_FOUND } else { NOT_EXECUTABLE })
}

/// Whether a failure of this check is one to end with.
fn stops(check: &str, args: &Args) -> bool {
    !(check == "swap" && args.fallback)
}

fn plan(args: &Args) -> Plan {
    let mut checks = Vec::new();
    let mut passed = |check, result: Result<PathBuf, Obstacle>| match result {
        Ok(path) => {
            checks.push((check, None));
            Some(path)
        }
        Err(obstacle) => {
            checks.push((check, Some(obstacle)));
            None
        }
    };
    let library = passed("library", find_library(args.library.as_deref()).and_then(check_library));
    let program = passed("command", find_program(&args.command[0]));
    if let Some(program) = &program {
        checks.push(("swap", check_program(program).err()));
    }
    let in_the_way = checks
        .iter()
        .find_map(|(check, obstacle)| obstacle.as_ref().filter(|_| stops(check, args)));
    let status = in_the_way.map_or(0, |obstacle| obstacle.status);

    let preload = library.as_ref().map(|library| preload(library, env::var_os("LD_PRELOAD")));
    let level = args.log_level.as_ref().map(|level| level.to_uppercase());
    let environment = [
        ("LD_PRELOAD", preload),
        ("MC_EFA_PROVIDER", args.provider.as_ref().map(OsString::from)),
        ("MC_EFA_LIBFABRIC", args.libfabric.clone()),
        ("MC_LOG_LEVEL", level.map(OsString::from)),
        ("MC_EFA_SWAP_FALLBACK", args.fallback.then(|| "1".into())),
    ];
    let environment =
        environment.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    Plan { library, environment, program, checks, status }
}

fn print(plan: &Plan, args: &Args) {
    let text = |text: &OsString| text.to_string_lossy().into_owned();
    let environment = plan.environment.iter().map(|(name, value)| (*name, text(value)));
    let program = plan.program.as_ref().map(|program| program.to_string_lossy());
    let arguments: Vec<String> = args.command[1..].iter().map(text).collect();
    if args.json {
        let checks = plan.checks.iter().map(|(check, obstacle)| {
            serde_json::json!({
                "check": check,
                "good": obstacle.is_none(),
                "status": obstacle.as_ref().map_or(0, |obstacle| obstacle.status),
                "why": obstacle.as_ref().map(|obstacle| &obstacle.why),
            })
        });
        let plan = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "environment": environment.collect::<BTreeMap<_, _>>(),
            "program": program,
            "arguments": arguments,
            "checks": checks.collect::<Vec<_>>(),
            "status": plan.status,
        });
        println!("{plan}");
        return;
    }
    for (name, value) in environment {
        println!("set    {name}={value}");
    }
    if let Some(program) = program {
        println!("run    {program} {arguments:?}");
    }
    for (check, obstacle) in &plan.checks {
        let verdict = obstacle.as_ref().map_or("good", |obstacle| &obstacle.why);
        println!("check  {check}: {verdict}");
    }
}

fn find_library(named: Option<&Path>) -> Result<PathBuf, Obstacle> {
    let from_env = env::var_os("MC_EFA_SWAP").filter(|path| !path.is_empty()).map(PathBuf::from);
    let places = match (named, from_env) {
        (Some(path), _) => vec![path.to_owned()],
        (None, Some(path)) => vec![path],
        (None, None) => {
            let executable = env::current_exe().unwrap_or_default();
            default_places(&executable).iter().map(|place| place.join(LIBRARY)).collect()
        }
    };
    if let Some(found) = places.iter().find(|place| place.is_file()) {
        return Ok(found.clone());
    }
    let places: Vec<_> = places.iter().map(|place| place.to_string_lossy()).collect();
    obstacle(
        NO_LIBRARY,
        format!(
            "the library to preload is not at {}; name it by --library or MC_EFA_SWAP",
            places.join(", ")
        ),
    )
}

/// Where the library is, for an executable that was installed or built.
fn default_places(executable: &Path) -> Vec<PathBuf> {
    let up = |levels: usize| executable.ancestors().nth(levels).unwrap_or(Path::new("/"));
    let multiarch = format!("lib/{}-linux-gnu", env::consts::ARCH);
    let mut places = vec![up(1).to_owned()];
    places.extend(["lib", "lib64", &multiarch].map(|lib| up(2).join(lib)));
    if up(2).ends_with("target") {
        places.extend(["build", "build/adapter"].map(|build| up(3).join(build)));
    }
    places
}

fn check_library(found: PathBuf) -> Result<PathBuf, Obstacle> {
    let cannot = |why: String| {
        obstacle(NO_LIBRARY, format!("{} cannot be preloaded: {why}", found.display()))
    };
    // The command may be started, and start others, in other directories.
    let path = match std::path::absolute(&found) {
        Ok(path) => path,
        Err(why) => return cannot(why.to_string()),
    };
    if path.as_os_str().as_bytes().iter().any(|byte| b" :".contains(byte)) {
        return cannot("LD_PRELOAD separates its entries by spaces and colons".into());
    }
    let data = match fs::read(&path) {
        Ok(data) => data,
        Err(why) => return cannot(why.to_string()),
    };
    match parse(&data) {
        Err(why) => cannot(why),
        Ok(elf) if elf.kind() != ObjectKind::Dynamic || has_interpreter(&elf) => {
            cannot("it is not a shared object".into())
        }
        Ok(_) => Ok(path),
    }
}

/// The library first, then what was there.
fn preload(library: &Path, before: Option<OsString>) -> OsString {
    let before = before.unwrap_or_default();
    let same = |entry: &[u8]| {
        let entry = Path::new(OsStr::from_bytes(entry)).canonicalize();
        entry.is_ok_and(|entry| library.canonicalize().is_ok_and(|library| library == entry))
    };
    let mut entries = vec![library.as_os_str().as_bytes()];
    entries.extend(
        before
            .as_bytes()
            .split(|byte| b" :".contains(byte))
            .filter(|entry| !entry.is_empty() && !same(entry)),
    );
    OsString::from_vec(entries.join(&b':'))
}

/// As a shell finds it.
fn find_program(name: &OsStr) -> Result<PathBuf, Obstacle> {
    let places: Vec<PathBuf> = if name.as_bytes().contains(&b'/') {
        vec![name.into()]
    } else {
        let path = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
        // An empty entry is the current directory.
        env::split_paths(&path).map(|place| Path::new(".").join(place).join(name)).collect()
    };
    let runs = |place: &&PathBuf| place.is_file() && access(*place, Access::EXEC_OK).is_ok();
    if let Some(program) = places.iter().find(runs) {
        return Ok(program.clone());
    }
    match places.iter().find(|place| place.exists()) {
        Some(place) => {
            obstacle(NOT_EXECUTABLE, format!("{} is not an executable file", place.display()))
        }
        None => obstacle(NOT_FOUND, format!("there is no command {}", name.to_string_lossy())),
    }
}

/// Whether a preloaded library gets into a program, and finds a Mooncake that it can serve.
fn check_program(program: &Path) -> Result<(), Obstacle> {
    let path = binary(program)?;
    let shown = path.display();
    let data = match fs::read(&path) {
        Ok(data) => data,
        // One may be allowed to run what one must not read.
        Err(why) => {
            log::warn!("{shown} is not checked: {why}");
            return Ok(());
        }
    };
    let elf = match parse(&data) {
        Ok(elf) => elf,
        Err(why) => return obstacle(FOREIGN, format!("nothing is preloaded into {shown}: {why}")),
    };
    if !has_interpreter(&elf) {
        return obstacle(
            STATIC,
            format!(
                "{shown} is statically linked, so nothing can be preloaded into it (if it only \
                 starts the program that uses Mooncake, put `mooncake-efa run --` before that one)"
            ),
        );
    }
    if gains_privileges(&path) {
        return obstacle(
            PRIVILEGED,
            format!(
                "{shown} is setuid, setgid or has file capabilities, so it ignores LD_PRELOAD (if \
                 it only starts the program that uses Mooncake, put `mooncake-efa run --` before \
                 that one)"
            ),
        );
    }
    let contains = |bytes: &[u8]| memmem::find(bytes, MANGLED).is_some();
    // Segments only: debug information names the transport wherever its header was included.
    let inside = elf.segments().any(|segment| segment.data().is_ok_and(contains));
    let exported = elf.dynamic_symbols().any(|symbol| symbol.name_bytes().is_ok_and(contains));
    if inside && !exported {
        return obstacle(
            MOONCAKE_INSIDE,
            format!(
                "Mooncake is linked into {shown} statically and cannot be swapped; rebuild that \
                 program with the CMake drop-in (docs/mooncake.md)"
            ),
        );
    }
    Ok(())
}

/// What the kernel loads for a program: itself, or a script's interpreter.
fn binary(program: &Path) -> Result<PathBuf, Obstacle> {
    let mut path = program.to_owned();
    // An interpreter may be a script again (those of pyenv are); the kernel goes this deep.
    for _ in 0..4 {
        let mut head = Vec::new();
        // 256 bytes are what the kernel looks at. An unreadable file is the caller's to report.
        if File::open(&path).and_then(|file| file.take(256).read_to_end(&mut head)).is_err() {
            break;
        }
        let Some(name) = interpreter(&head) else { break };
        path = find_program(name).map_err(|Obstacle { status, why }| Obstacle {
            status,
            why: format!("{} needs an interpreter, and {why}", path.display()),
        })?;
    }
    Ok(path)
}

/// Who reads a file that begins like this; `None` for an ELF file.
fn interpreter(head: &[u8]) -> Option<&OsStr> {
    if head.starts_with(&elf::ELFMAG) {
        return None;
    }
    let line = head.strip_prefix(b"#!").and_then(|rest| rest.split(|byte| *byte == b'\n').next());
    let mut words =
        line.unwrap_or_default().split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    // Without a `#!` line exec leaves it to the shell.
    let first = words.next().unwrap_or(b"/bin/sh");
    let mut name = first;
    if first.ends_with(b"/env") {
        let named = words.find(|word| *word != b"-S" && !word.contains(&b'='));
        // Any other option of env may have an argument; then only env is checked.
        name = named.filter(|word| !word.starts_with(b"-")).unwrap_or(first);
    }
    Some(OsStr::from_bytes(name))
}

/// An ELF file of this machine.
fn parse(data: &[u8]) -> Result<ElfFile64<'_>, String> {
    let elf =
        ElfFile64::parse(data).map_err(|why| format!("it is not a 64-bit ELF file ({why})"))?;
    // `object` and Rust spell architectures alike, but for case.
    let machine = format!("{:?}", elf.architecture()).to_lowercase();
    if machine == env::consts::ARCH {
        Ok(elf)
    } else {
        Err(format!("it is for {machine}, and this machine is {}", env::consts::ARCH))
    }
}

/// Whether a loader, which is who preloads, starts it.
fn has_interpreter(elf: &ElfFile64) -> bool {
    elf.elf_program_headers().iter().any(|header| header.p_type(elf.endian()) == elf::PT_INTERP)
}

/// Whether the kernel tells the loader to distrust the environment.
fn gains_privileges(path: &Path) -> bool {
    let Ok(file) = path.metadata() else { return false };
    let (user, group) = (getuid(), getgid());
    let sets_user = file.mode() & 0o4000 != 0 && file.uid() != user.as_raw();
    let sets_group = file.mode() & 0o2010 == 0o2010 && file.gid() != group.as_raw();
    let capable = !user.is_root() && getxattr(path, "security.capability", &mut [0; 64]).is_ok();
    sets_user || sets_group || capable
}
