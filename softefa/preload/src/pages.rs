//! How many entries of a NIC's page table a region takes.

use std::fs;

const PAGE: u64 = 4096;

/// Pages of `length` bytes at `address`. Pages of 4 KiB unless that would be more than `most`: only
/// then it is worth asking the kernel whether they are huge.
pub fn count(address: u64, length: u64, most: u64) -> u64 {
    let small = spanned(address, length, PAGE);
    if small <= most / 2 {
        return small;
    }
    let maps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    spanned(address, length, page_size(&maps, address, length))
}

fn spanned(address: u64, length: u64, page: u64) -> u64 {
    (address + length).div_ceil(page) - address / page
}

/// The smallest page size among the mappings that the range touches.
fn page_size(maps: &str, address: u64, length: u64) -> u64 {
    let mut touched = false;
    let mut smallest = u64::MAX;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let first = words.next().unwrap_or_default();
        if first == "KernelPageSize:" {
            let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(4);
            if touched {
                smallest = smallest.min(kib << 10);
            }
        } else if let Some((from, to)) = first.split_once('-') {
            let bounds = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16));
            if let (Ok(from), Ok(to)) = bounds {
                touched = from < address + length && address < to;
            }
        }
    }
    if smallest == u64::MAX { PAGE } else { smallest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_those_touched() {
        assert_eq!(spanned(0, 1, PAGE), 1);
        assert_eq!(spanned(PAGE - 1, 2, PAGE), 2);
        assert_eq!(spanned(PAGE, PAGE, PAGE), 1);
        assert_eq!(count(0x1000, 1 << 20, 1 << 30), 256);
    }

    #[test]
    fn huge_pages_are_found() {
        let maps = "7f0000000000-7f0040000000 rw-s 00000000 00:0f 1 /dev/hugepages/a\n\
                    Size: 1048576 kB\nKernelPageSize:     2048 kB\n\
                    7f0040000000-7f0040001000 rw-p 00000000 00:00 0\nKernelPageSize:        4 kB\n";
        assert_eq!(page_size(maps, 0x7f00_0000_0000, 1 << 30), 2 << 20);
        assert_eq!(page_size(maps, 0x7f00_0000_0000, (1 << 30) + 1), 4096);
        assert_eq!(page_size(maps, 0x1000, 10), 4096);
    }
}
