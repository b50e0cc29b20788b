//! Sizes and rates as people write them.

use clap::ValueEnum;

/// `65536`, `64K`, `1G`: bytes, with binary suffixes.
pub fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KIB" => 1 << 10,
        "M" | "MIB" => 1 << 20,
        "G" | "GIB" => 1 << 30,
        _ => return Err(format!("{text}: a number of bytes, or one with K, M or G")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text}: not a number of bytes"))?;
    match number.checked_mul(factor) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(format!("{text}: at least 1 byte, and fewer than 2^64")),
    }
}

/// Unit of a rate, a second.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "verbatim")]
#[allow(missing_docs)]
pub enum Unit {
    GB,
    GiB,
    Gb,
    MB,
    MiB,
    Mb,
    KB,
    KiB,
    Kb,
}

impl Unit {
    /// A rate of bytes a second in this unit, with its name.
    pub fn rate(self, bytes_per_second: f64, precision: usize) -> String {
        let bytes = match self {
            Self::GB => 1e9,
            Self::GiB => f64::from(1_u32 << 30),
            Self::Gb => 1e9 / 8.0,
            Self::MB => 1e6,
            Self::MiB => f64::from(1_u32 << 20),
            Self::Mb => 1e6 / 8.0,
            Self::KB => 1e3,
            Self::KiB => 1024.0,
            Self::Kb => 1e3 / 8.0,
        };
        format!("{:.precision$} {self:?}/s", bytes_per_second / bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("65536"), Ok(65536));
        assert_eq!(size("64K"), Ok(65536));
        assert_eq!(size("2g"), Ok(2 << 30));
        assert_eq!(size("1MiB"), Ok(1 << 20));
        for wrong in ["", "K", "0", "-1", "1T", "1.5G", "99999999999G"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(Unit::GB.rate(1.5e9, 2), "1.50 GB/s");
        assert_eq!(Unit::Gb.rate(1.0e9, 1), "8.0 Gb/s");
        assert_eq!(Unit::KiB.rate(2048.0, 0), "2 KiB/s");
    }
}
