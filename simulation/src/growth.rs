//!
/// A
#[derive(clap::Args)]
pub struct Args {}
/// B
pub fn run(_: &Args, _: bool) -> Result<(), String> {
    Ok(())
}
