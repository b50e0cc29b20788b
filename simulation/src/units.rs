//! Sizes as people write them.

/// Bytes from `4096`, `64K`, `1M`, `1G` (powers of 1024).
///
/// # Errors
/// One line that says what is understood.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        _ => return Err(format!("{text:?}: write 4096, 64K, 1M or 1G")),
    };
    let count: u64 = digits.parse().map_err(|_| format!("{text:?}: write 4096, 64K, 1M or 1G"))?;
    match count.checked_mul(1 << shift) {
        Some(bytes @ 1..) => Ok(bytes),
        _ => Err(format!("{text:?}: from 1 byte to 2^64")),
    }
}

/// Bytes as [`parse_size`] reads them, in the largest unit that is exact.
pub fn size(bytes: u64) -> String {
    for (shift, unit) in [(30, "G"), (20, "M"), (10, "K")] {
        if bytes >= 1 << shift && bytes % (1 << shift) == 0 {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for bytes in [1, 1000, 4096, 64 << 10, 1 << 20, 3 << 30, 1 << 40] {
            assert_eq!(parse_size(&size(bytes)), Ok(bytes));
        }
        for text in ["", "K", "1T", "0", "-1", "99999999999G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
