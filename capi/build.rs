//! Gives the shared library its SONAME, which Cargo leaves out: without it a program would record
//! the path of the file it was linked with, and installing a new version beside the old one could
//! not work.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let var = |name| std::env::var(name).unwrap_or_default();
    if var("CARGO_CFG_TARGET_OS") == "linux" {
        let major = var("CARGO_PKG_VERSION_MAJOR");
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libmooncake_efa.so.{major}");
    }
}
