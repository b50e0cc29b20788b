//! `softefa`, the command.
fn main() {}
