//! The functions of `transfer_engine_c.h`.
#![allow(unsafe_code)]
