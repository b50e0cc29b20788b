//! Log lines to the host.

use std::ffi::CString;
use std::sync::OnceLock;

use arc_swap::ArcSwapOption;
use log::{LevelFilter, Log, Metadata, Record};

use super::Context;
use super::types::mefa_log_fn;

struct Sink {
    function: unsafe extern "C" fn(*mut std::ffi::c_void, std::ffi::c_int, *const std::ffi::c_char),
    context: Context,
}

struct Logger;

static SINK: ArcSwapOption<Sink> = ArcSwapOption::const_empty();

impl Log for Logger {
    fn enabled(&self, _: &Metadata) -> bool {
        true // set_max_level has decided already
    }

    fn log(&self, record: &Record) {
        let text = record.args().to_string();
        match &*SINK.load() {
            Some(sink) => {
                let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
                // SAFETY: the host gave the function for this, with this context.
                unsafe { (sink.function)(sink.context.0, record.level() as _, text.as_ptr()) }
            }
            None => eprintln!("[mooncake-efa] {}: {text}", record.level()),
        }
    }

    fn flush(&self) {}
}

/// Makes `log` lines of this library, from this level on, go to the host, or to standard error before it gave a sink.
pub(super) fn start(level: LevelFilter) {
    static OURS: OnceLock<bool> = OnceLock::new();
    // A Rust program that uses the C door may have a logger of its own: then that one has the lines.
    if *OURS.get_or_init(|| log::set_logger(&Logger).is_ok()) {
        log::set_max_level(level);
    }
}

/// Sets where the lines go.
pub(super) fn set_sink(function: mefa_log_fn, context: Context) {
    SINK.store(function.map(|function| std::sync::Arc::new(Sink { function, context })));
}
