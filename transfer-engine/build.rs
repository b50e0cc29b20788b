//! Gives the shared library its SONAME, which Cargo leaves out: the one that Mooncake's has, so that a program
//! linked with either runs with the other.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libtransfer_engine.so");
    }
}
