//! Segments by handle.
#![forbid(unsafe_code)]
