//! File functions of the C library that see the emulated `/sys`.
