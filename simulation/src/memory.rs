//!
/// B
pub fn run(_: bool) -> Result<(), String> {
    Ok(())
}
