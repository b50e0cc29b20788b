//! Which NICs a host has.
