//! Who is where, and what they have.
#![forbid(unsafe_code)]
