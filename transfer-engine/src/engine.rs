//! One engine.
#![forbid(unsafe_code)]
