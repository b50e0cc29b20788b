//! Log lines, to standard error or to a file in `MC_LOG_DIR`, from `MC_LOG_LEVEL` on.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::Once;

use env_logger::{Builder, Target};
use mooncake_efa::config::Config;

/// Starts logging, once a process.
pub fn start() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let (config, warnings) = Config::from_lookup(|name| {
            Some(std::env::var_os(name)?.to_string_lossy().into_owned())
        });
        let _ = warnings; // told by whoever reads it next
        let mut builder = Builder::new();
        builder.filter_level(config.log_level);
        builder.format(|line, record| {
            writeln!(line, "[mooncake-efa] {}: {}", record.level(), record.args())
        });
        if let Some(directory) = &config.log_dir {
            let path = directory.join(format!("transfer_engine.{}.log", std::process::id()));
            match OpenOptions::new().create(true).append(true).open(&path) {
                Ok(file) => drop(builder.target(Target::Pipe(Box::new(file)))),
                Err(why) => eprintln!(
                    "[mooncake-efa] WARN: {}: {why}; the log goes to standard error",
                    path.display()
                ),
            }
        }
        // A Rust program may have a logger of its own: then that one has the lines.
        let _ = builder.try_init();
    });
}
