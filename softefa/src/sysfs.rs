//! The `/sys` of an emulated host.
