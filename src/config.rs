//! Every environment variable this library acts on, read once into one validated struct.
//!
//! Names, meanings and ranges are Mooncake's where Mooncake has the variable. A value is trimmed,
//! and an empty one counts as unset. A bad value keeps the default and costs one warning.
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use log::LevelFilter;

/// Which NICs a GPU's memory is registered on. The host's is on every NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicSelection {
    /// Every NIC.
    All,
    /// The NICs nearest to the GPU, by the topology.
    Local,
}

/// The settings of one process. [`Config::default`] holds the documented defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `MC_EFA_PROVIDER`: the libfabric provider. Default `efa`; others are for development.
    pub provider: String,
    /// `MC_EFA_LIBFABRIC`: path of the libfabric to load. Default: the loader's search path.
    pub libfabric: Option<String>,
    /// `MC_TE_FILTERS`: comma list of the NICs that may be used. Default empty: all of them.
    pub devices: Vec<String>,
    /// `MC_CUSTOM_TOPO_JSON`: file with a NIC priority matrix. Default: topology is discovered.
    pub custom_topology: Option<PathBuf>,
    /// `CUDA_VISIBLE_DEVICES`: which GPUs CUDA shows, and so what `cuda:0` is, as it stands: set but empty, it is
    /// none of them. Default: all.
    pub cuda_visible_devices: Option<String>,
    /// `CUDA_DEVICE_ORDER`: `PCI_BUS_ID` has CUDA number GPUs by PCI address; `FASTEST_FIRST`, CUDA's default, has it
    /// do so with like ones only. Default off.
    pub cuda_pci_order: bool,
    /// `MC_EFA_CQ_THREADS`: polling threads; 0 is one a NIC, more than NICs is the same as that.
    /// Default 1. Each costs up to a core while transfers are under way.
    pub pollers: usize,
    /// `MC_EFA_NIC_SELECTION`: `local` or `all`. Default `local` (Mooncake's own transport: `all`): a GPU's memory is
    /// registered on the NICs nearest to it only, which caps a transfer of it at their bandwidth. `all` registers it on
    /// every NIC, which takes longer in proportion.
    pub nic_selection: NicSelection,
    /// `MC_MAX_WR`: operations in flight on one NIC, 1 to 65535. Default: what the provider can
    /// hold. Lower throttles; higher than the provider's is clamped to it.
    pub max_wr: Option<usize>,
    /// `MC_MAX_CQE_PER_CTX`: entries asked for in one NIC's completion queue, 1 to 65535.
    /// Default 4096. Costs provider memory for each entry.
    pub max_cqe: usize,
    /// `MC_MAX_EP_PER_CTX`: peer addresses one NIC makes room for, 1 to 65536. Default 65536.
    /// Costs provider memory for each address.
    pub av_size: usize,
    /// `MC_MAX_MR_SIZE`: bytes of one memory region, at least 1; longer buffers are split, and
    /// the device's own limit clamps it. Default 1 TiB. Small values cost one key each split.
    pub max_mr_size: u64,
    /// `MC_RETRY_CNT`: tries of one operation before its request fails, 1 to 127. Default 9.
    pub retry_count: u32,
    /// `MC_ENABLE_PARALLEL_REG_MR`: whether one buffer is registered on several NICs at a time;
    /// -1 lets the library choose, 0 is no, 1 is yes. Default -1, here `None`. Slower than one
    /// after the other where the memory has never been touched.
    pub parallel_reg: Option<bool>,
    /// `MC_MAX_CONCURRENT_REG_MR`: threads that register memory in this process; 0 lets the
    /// library choose. Default 0. More threads than cores cost more than too few.
    pub reg_threads: usize,
    /// `MC_PATH_ROUNDROBIN`: `1` or `true` chooses NICs in turn. Default off.
    pub path_round_robin: bool,
    /// `MC_SLICE_SIZE`: most bytes of one posted operation, 1 to 2^40. Default: chosen by the
    /// library. Small values cost a completion for each piece.
    pub slice_size: Option<u64>,
    /// `MC_SLICE_TIMEOUT`: seconds until an operation that has not completed counts as lost,
    /// 1 to 65535. Default 30 s (Mooncake's EFA transport waits for ever).
    pub slice_timeout: Duration,
    /// `MC_EFA_MERGE`: `0` or `false` stops the merging of neighbouring requests that are
    /// contiguous on both sides. Default on; off is for measurements.
    pub merge: bool,
    /// `MC_LOG_LEVEL`: `TRACE`, `INFO`, `WARNING` or `ERROR`, in any case. Default `INFO`.
    pub log_level: LevelFilter,
    /// `MC_LOG_DIR`: directory for log files. Default: logs go to stderr.
    pub log_dir: Option<PathBuf>,
    /// `MC_HANDSHAKE_PORT`: TCP port of the handshake where the server name has none, 1 to 65535.
    /// Default 12001.
    pub handshake_port: u16,
    /// `MC_HANDSHAKE_CONNECT_TIMEOUT`: seconds to wait for a peer's handshake port, 1 to 3599.
    /// Default 5 s.
    pub handshake_connect_timeout: Duration,
    /// `MC_HANDSHAKE_LISTEN_BACKLOG`: connections that may wait on the handshake port, 1 to
    /// 2147483647. Default 128.
    pub handshake_listen_backlog: i32,
    /// `MC_HANDSHAKE_MAX_LENGTH`: most bytes of one handshake message, 1 MiB to 128 MiB. Default
    /// 1 MiB. A segment of more than about 10,000 buffers needs more.
    pub handshake_max_length: usize,
    /// `MC_MIN_RPC_PORT` and `MC_MAX_RPC_PORT` (or, as old releases spelt them, `..._PRC_PORT`):
    /// range to pick the handshake port from. Each end is 1024 to 32767 or 61000 to 65535.
    /// Default 15000 to 17000.
    pub rpc_ports: RangeInclusive<u16>,
    /// `MC_LEGACY_RPC_PORT_BINDING`: set to anything, even `0`: bind the address and port given by
    /// the caller. Default off.
    pub legacy_rpc_port_binding: bool,
    /// `MC_TCP_BIND_ADDRESS`: address to publish for the handshake. Default: the first LAN address.
    pub tcp_bind_address: Option<String>,
    /// `MC_USE_IPV6`: set to anything, even `0`: handshakes use IPv6. Default off.
    pub use_ipv6: bool,
    /// `MC_DISABLE_METACACHE`: set to anything, even `0`: a peer's descriptor is fetched for every
    /// batch. Default off. On costs a round trip a batch.
    pub disable_metacache: bool,
    /// `MC_TE_METADATA_REFRESH_INTERVAL_SECONDS`: seconds between refreshes of the peers'
    /// descriptors, 0 to 2147483647; 0 is never. Default 0, here `None`.
    pub metadata_refresh_interval: Option<Duration>,
    /// `MC_METADATA_CLUSTER_ID`: goes between `mooncake/` and the rest of a metadata key. Default:
    /// nothing does.
    pub metadata_cluster_id: Option<String>,
    /// `MC_TE_METRIC`: `1`, `true`, `yes` or `on` reports throughput at intervals. Default off.
    pub te_metric: bool,
    /// `MC_TE_METRIC_INTERVAL_SECONDS`: seconds between those reports, 1 to 2147483647. Default 5 s.
    pub te_metric_interval: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            provider: "efa".into(),
            libfabric: None,
            devices: Vec::new(),
            custom_topology: None,
            cuda_visible_devices: None,
            cuda_pci_order: false,
            pollers: 1,
            nic_selection: NicSelection::Local,
            max_wr: None,
            max_cqe: 4096,
            av_size: 65536,
            max_mr_size: 1 << 40,
            retry_count: 9,
            parallel_reg: None,
            reg_threads: 0,
            path_round_robin: false,
            slice_size: None,
            slice_timeout: Duration::from_secs(30),
            merge: true,
            log_level: LevelFilter::Info,
            log_dir: None,
            handshake_port: 12001,
            handshake_connect_timeout: Duration::from_secs(5),
            handshake_listen_backlog: 128,
            handshake_max_length: 1 << 20,
            rpc_ports: 15000..=17000,
            legacy_rpc_port_binding: false,
            tcp_bind_address: None,
            use_ipv6: false,
            disable_metacache: false,
            metadata_refresh_interval: None,
            metadata_cluster_id: None,
            te_metric: false,
            te_metric_interval: Duration::from_secs(5),
        }
    }
}

const ONE_TRUE: &[(&str, bool)] = &[("0", false), ("1", true), ("false", false), ("true", true)];
const YES_ON: &[(&str, bool)] = &[
    ("0", false),
    ("1", true),
    ("false", false),
    ("true", true),
    ("no", false),
    ("yes", true),
    ("off", false),
    ("on", true),
];

impl Config {
    /// Reads the process's environment; each bad value is logged as one warning.
    pub fn from_env() -> Self {
        // Lossy, so that a value that is not UTF-8 is warned about like any other bad one.
        let lookup = |name: &str| Some(std::env::var_os(name)?.to_string_lossy().into_owned());
        let (config, warnings) = Self::from_lookup(lookup);
        for warning in warnings {
            log::warn!("{warning}");
        }
        config
    }

    /// Reads the variables through `lookup`, and returns the warnings about bad values.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> (Self, Vec<String>) {
        let mut c = Self::default();
        let mut r = Reader { lookup, warnings: Vec::new() };

        c.provider = r.text("MC_EFA_PROVIDER").unwrap_or(c.provider);
        c.libfabric = r.text("MC_EFA_LIBFABRIC");
        c.devices = r.list("MC_TE_FILTERS");
        c.custom_topology = r.text("MC_CUSTOM_TOPO_JSON").map(PathBuf::from);
        c.cuda_visible_devices = (r.lookup)("CUDA_VISIBLE_DEVICES");
        const ORDERS: &[(&str, bool)] = &[("FASTEST_FIRST", false), ("PCI_BUS_ID", true)];
        r.word("CUDA_DEVICE_ORDER", ORDERS, &mut c.cuda_pci_order);
        r.number("MC_EFA_CQ_THREADS", 0..=65535, &mut c.pollers);
        const SELECTION: &[(&str, NicSelection)] =
            &[("local", NicSelection::Local), ("all", NicSelection::All)];
        r.word("MC_EFA_NIC_SELECTION", SELECTION, &mut c.nic_selection);
        c.max_wr = r.optional("MC_MAX_WR", 1..=65535, "the provider's depth");
        r.number("MC_MAX_CQE_PER_CTX", 1..=65535, &mut c.max_cqe);
        r.number("MC_MAX_EP_PER_CTX", 1..=65536, &mut c.av_size);
        r.number("MC_MAX_MR_SIZE", 1..=i64::MAX as u64, &mut c.max_mr_size);
        r.number("MC_RETRY_CNT", 1..=127, &mut c.retry_count);
        const PARALLEL: &[(&str, Option<bool>)] =
            &[("-1", None), ("0", Some(false)), ("1", Some(true))];
        r.word("MC_ENABLE_PARALLEL_REG_MR", PARALLEL, &mut c.parallel_reg);
        r.number("MC_MAX_CONCURRENT_REG_MR", 0..=65535, &mut c.reg_threads);
        r.word("MC_PATH_ROUNDROBIN", ONE_TRUE, &mut c.path_round_robin);
        c.slice_size = r.optional("MC_SLICE_SIZE", 1..=1 << 40, "the library's choice");
        r.seconds("MC_SLICE_TIMEOUT", 1..=65535, &mut c.slice_timeout);
        r.word("MC_EFA_MERGE", ONE_TRUE, &mut c.merge);
        const LEVELS: &[(&str, LevelFilter)] = &[
            ("TRACE", LevelFilter::Trace),
            ("INFO", LevelFilter::Info),
            ("WARNING", LevelFilter::Warn),
            ("ERROR", LevelFilter::Error),
        ];
        r.word("MC_LOG_LEVEL", LEVELS, &mut c.log_level);
        c.log_dir = r.directory("MC_LOG_DIR", "stderr");
        r.number("MC_HANDSHAKE_PORT", 1..=65535, &mut c.handshake_port);
        r.seconds("MC_HANDSHAKE_CONNECT_TIMEOUT", 1..=3599, &mut c.handshake_connect_timeout);
        r.number("MC_HANDSHAKE_LISTEN_BACKLOG", 1..=i32::MAX, &mut c.handshake_listen_backlog);
        r.number("MC_HANDSHAKE_MAX_LENGTH", 1 << 20..=128 << 20, &mut c.handshake_max_length);
        r.ports(&mut c.rpc_ports);
        c.legacy_rpc_port_binding = r.present("MC_LEGACY_RPC_PORT_BINDING");
        c.tcp_bind_address = r.text("MC_TCP_BIND_ADDRESS");
        c.use_ipv6 = r.present("MC_USE_IPV6");
        c.disable_metacache = r.present("MC_DISABLE_METACACHE");
        let refresh =
            r.optional("MC_TE_METADATA_REFRESH_INTERVAL_SECONDS", 0..=i32::MAX as u64, "never");
        c.metadata_refresh_interval = refresh.filter(|s| *s > 0).map(Duration::from_secs);
        c.metadata_cluster_id = r.text("MC_METADATA_CLUSTER_ID");
        r.word("MC_TE_METRIC", YES_ON, &mut c.te_metric);
        r.seconds("MC_TE_METRIC_INTERVAL_SECONDS", 1..=i32::MAX as u64, &mut c.te_metric_interval);

        (c, r.warnings)
    }
}

/// Looks variables up and gathers the warnings.
struct Reader<F> {
    lookup: F,
    warnings: Vec<String>,
}

impl<F: Fn(&str) -> Option<String>> Reader<F> {
    fn text(&self, name: &str) -> Option<String> {
        let value = (self.lookup)(name)?;
        let value = value.trim();
        (!value.is_empty()).then(|| value.to_owned())
    }

    fn list(&self, name: &str) -> Vec<String> {
        let value = self.text(name).unwrap_or_default();
        value.split(',').map(str::trim).filter(|v| !v.is_empty()).map(str::to_owned).collect()
    }

    /// Mooncake's test for these is that the variable exists: `0` turns them on as well.
    fn present(&mut self, name: &str) -> bool {
        let Some(value) = (self.lookup)(name) else { return false };
        let value = value.trim();
        if YES_ON.iter().any(|(word, on)| !on && word.eq_ignore_ascii_case(value)) {
            self.warnings.push(format!(
                "{name}={value:?} turns it on, as any value does; unset the variable to turn it off"
            ));
        }
        true
    }

    /// The value as `parse` reads it; `None` if unset, or, after a warning, if `parse` refuses.
    fn parsed<T>(
        &mut self,
        name: &str,
        allowed: impl Display,
        kept: impl Display,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = self.text(name)?;
        let parsed = parse(&value);
        if parsed.is_none() {
            self.warn(name, &value, allowed, kept);
        }
        parsed
    }

    fn warn(&mut self, name: &str, value: &str, allowed: impl Display, kept: impl Display) {
        self.warnings.push(format!("{name}={value:?} must be {allowed}; keeping {kept}"));
    }

    fn optional<T>(&mut self, name: &str, range: RangeInclusive<T>, kept: impl Display) -> Option<T>
    where
        T: FromStr + PartialOrd + Display,
    {
        let allowed = format!("a whole number from {} to {}", range.start(), range.end());
        self.parsed(name, allowed, kept, |v| v.parse().ok().filter(|v| range.contains(v)))
    }

    fn number<T>(&mut self, name: &str, range: RangeInclusive<T>, field: &mut T)
    where
        T: FromStr + PartialOrd + Display,
    {
        if let Some(value) = self.optional(name, range, &*field) {
            *field = value;
        }
    }

    fn seconds(&mut self, name: &str, range: RangeInclusive<u64>, field: &mut Duration) {
        let mut seconds = field.as_secs();
        self.number(name, range, &mut seconds);
        *field = Duration::from_secs(seconds);
    }

    fn word<T: Copy + PartialEq>(&mut self, name: &str, words: &[(&str, T)], field: &mut T) {
        let allowed: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let kept = words.iter().find(|(_, value)| value == field).map_or("", |(word, _)| word);
        let find = |v: &str| words.iter().find(|(w, _)| w.eq_ignore_ascii_case(v)).map(|w| w.1);
        if let Some(value) = self.parsed(name, allowed.join(", "), kept, find) {
            *field = value;
        }
    }

    fn directory(&mut self, name: &str, kept: &str) -> Option<PathBuf> {
        self.parsed(name, "a directory", kept, |v| Some(PathBuf::from(v)).filter(|p| p.is_dir()))
    }

    /// The two ends are judged together: one bad end puts both back.
    fn ports(&mut self, field: &mut RangeInclusive<u16>) {
        let end = |name: &str, old_name: &str, default: u16| {
            self.text(name).or_else(|| self.text(old_name)).unwrap_or_else(|| default.to_string())
        };
        let min = end("MC_MIN_RPC_PORT", "MC_MIN_PRC_PORT", *field.start());
        let max = end("MC_MAX_RPC_PORT", "MC_MAX_PRC_PORT", *field.end());
        // The gap is where the kernel takes the ports of outgoing connections from.
        let usable = |p: &u16| matches!(p, 1024..=32767 | 61000..=65535);
        let port = |v: &str| v.parse().ok().filter(usable);
        match (port(&min), port(&max)) {
            (Some(min), Some(max)) if min <= max => *field = min..=max,
            _ => self.warn(
                "MC_MIN_RPC_PORT, MC_MAX_RPC_PORT",
                &format!("{min}, {max}"),
                "ports from 1024 to 32767 or 61000 to 65535, the first not above the second",
                format_args!("{}, {}", field.start(), field.end()),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> (Config, Vec<String>) {
        Config::from_lookup(|name| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string())
        })
    }

    /// What `set` makes of the defaults.
    fn changed(set: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config::default();
        set(&mut config);
        config
    }

    #[test]
    fn all_are_in_the_documentation() {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/environment.md"))
                .unwrap();
        let seen = std::cell::RefCell::new(Vec::new());
        let look = |name: &str| {
            seen.borrow_mut().push(name.to_owned());
            None
        };
        Config::from_lookup(look);
        // As old releases spelt two of them.
        for name in seen.into_inner().iter().filter(|name| !name.contains("_PRC_")) {
            assert!(text.contains(&format!("`{name}`")), "{name}");
        }
    }

    #[test]
    fn nothing_set_gives_the_documented_defaults() {
        let (config, warnings) = read(&[]);
        assert_eq!(config, Config::default());
        assert!(warnings.is_empty());
        assert_eq!(config.provider, "efa");
        assert_eq!((config.pollers, config.max_cqe, config.av_size), (1, 4096, 65536));
        assert_eq!((config.max_mr_size, config.retry_count), (1 << 40, 9));
        assert_eq!(config.slice_timeout, Duration::from_secs(30));
        assert_eq!((config.handshake_port, config.handshake_listen_backlog), (12001, 128));
        assert_eq!(config.handshake_connect_timeout, Duration::from_secs(5));
        assert_eq!(config.handshake_max_length, 1 << 20);
        assert_eq!(config.rpc_ports, 15000..=17000);
        assert!(config.merge);
    }

    #[test]
    fn each_variable_reaches_its_field() {
        type Set = fn(&mut Config);
        let table: &[(&str, &str, Set)] = &[
            ("MC_EFA_PROVIDER", "tcp;ofi_rxm", |c| c.provider = "tcp;ofi_rxm".into()),
            ("MC_EFA_LIBFABRIC", "/opt/f.so", |c| c.libfabric = Some("/opt/f.so".into())),
            ("MC_TE_FILTERS", " a , ,b,", |c| c.devices = vec!["a".into(), "b".into()]),
            ("MC_CUSTOM_TOPO_JSON", "t.json", |c| c.custom_topology = Some("t.json".into())),
            ("CUDA_VISIBLE_DEVICES", "", |c| c.cuda_visible_devices = Some(String::new())),
            ("CUDA_VISIBLE_DEVICES", " 1,0", |c| c.cuda_visible_devices = Some(" 1,0".into())),
            ("CUDA_DEVICE_ORDER", "PCI_BUS_ID", |c| c.cuda_pci_order = true),
            ("MC_EFA_CQ_THREADS", "0", |c| c.pollers = 0),
            ("MC_EFA_NIC_SELECTION", "ALL", |c| c.nic_selection = NicSelection::All),
            ("MC_MAX_WR", "128", |c| c.max_wr = Some(128)),
            ("MC_MAX_CQE_PER_CTX", "65535", |c| c.max_cqe = 65535),
            ("MC_MAX_EP_PER_CTX", " +64 ", |c| c.av_size = 64),
            ("MC_MAX_MR_SIZE", "9223372036854775807", |c| c.max_mr_size = i64::MAX as u64),
            ("MC_RETRY_CNT", "127", |c| c.retry_count = 127),
            ("MC_ENABLE_PARALLEL_REG_MR", "0", |c| c.parallel_reg = Some(false)),
            ("MC_ENABLE_PARALLEL_REG_MR", "1", |c| c.parallel_reg = Some(true)),
            ("MC_ENABLE_PARALLEL_REG_MR", "-1", |c| c.parallel_reg = None),
            ("MC_MAX_CONCURRENT_REG_MR", "16", |c| c.reg_threads = 16),
            ("MC_PATH_ROUNDROBIN", "True", |c| c.path_round_robin = true),
            ("MC_SLICE_SIZE", "262144", |c| c.slice_size = Some(262144)),
            ("MC_SLICE_TIMEOUT", "60", |c| c.slice_timeout = Duration::from_secs(60)),
            ("MC_EFA_MERGE", "0", |c| c.merge = false),
            ("MC_LOG_LEVEL", "TRACE", |c| c.log_level = LevelFilter::Trace),
            ("MC_LOG_LEVEL", "WARNING", |c| c.log_level = LevelFilter::Warn),
            ("MC_LOG_LEVEL", "error", |c| c.log_level = LevelFilter::Error),
            ("MC_LOG_DIR", "/", |c| c.log_dir = Some("/".into())),
            ("MC_HANDSHAKE_PORT", "1", |c| c.handshake_port = 1),
            ("MC_HANDSHAKE_CONNECT_TIMEOUT", "3599", |c| {
                c.handshake_connect_timeout = Duration::from_secs(3599);
            }),
            ("MC_HANDSHAKE_LISTEN_BACKLOG", "1", |c| c.handshake_listen_backlog = 1),
            ("MC_HANDSHAKE_MAX_LENGTH", "134217728", |c| c.handshake_max_length = 128 << 20),
            ("MC_MIN_RPC_PORT", "1024", |c| c.rpc_ports = 1024..=17000),
            ("MC_MAX_PRC_PORT", "65535", |c| c.rpc_ports = 15000..=65535),
            ("MC_LEGACY_RPC_PORT_BINDING", "", |c| c.legacy_rpc_port_binding = true),
            ("MC_TCP_BIND_ADDRESS", "10.0.0.1", |c| c.tcp_bind_address = Some("10.0.0.1".into())),
            ("MC_USE_IPV6", "1", |c| c.use_ipv6 = true),
            ("MC_DISABLE_METACACHE", "1", |c| c.disable_metacache = true),
            ("MC_TE_METADATA_REFRESH_INTERVAL_SECONDS", "7", |c| {
                c.metadata_refresh_interval = Some(Duration::from_secs(7));
            }),
            ("MC_TE_METADATA_REFRESH_INTERVAL_SECONDS", "0", |_| ()),
            ("MC_METADATA_CLUSTER_ID", "blue", |c| c.metadata_cluster_id = Some("blue".into())),
            ("MC_TE_METRIC", "Yes", |c| c.te_metric = true),
            ("MC_TE_METRIC_INTERVAL_SECONDS", "7", |c| {
                c.te_metric_interval = Duration::from_secs(7)
            }),
            ("MC_MAX_WR", " ", |_| ()),
        ];
        for (name, value, set) in table {
            assert_eq!(read(&[(name, value)]), (changed(set), vec![]), "{name}={value}");
        }
    }

    #[test]
    fn each_bad_value_keeps_the_default_with_one_warning() {
        let table = [
            ("CUDA_DEVICE_ORDER", "2", "FASTEST_FIRST, PCI_BUS_ID; keeping FASTEST_FIRST"),
            ("MC_EFA_CQ_THREADS", "-1", "a whole number from 0 to 65535; keeping 1"),
            ("MC_EFA_NIC_SELECTION", "near", "local, all; keeping local"),
            ("MC_MAX_WR", "0", "from 1 to 65535; keeping the provider's depth"),
            ("MC_MAX_WR", "65536", "from 1 to 65535; keeping the provider's depth"),
            ("MC_MAX_WR", "128k", "from 1 to 65535; keeping the provider's depth"),
            ("MC_MAX_CQE_PER_CTX", "65536", "from 1 to 65535; keeping 4096"),
            ("MC_MAX_EP_PER_CTX", "65537", "from 1 to 65536; keeping 65536"),
            ("MC_MAX_MR_SIZE", "0", "; keeping 1099511627776"),
            ("MC_RETRY_CNT", "128", "from 1 to 127; keeping 9"),
            ("MC_ENABLE_PARALLEL_REG_MR", "2", "-1, 0, 1; keeping -1"),
            ("MC_MAX_CONCURRENT_REG_MR", "many", "keeping 0"),
            ("MC_PATH_ROUNDROBIN", "yes", "0, 1, false, true; keeping 0"),
            ("MC_SLICE_SIZE", "0", "keeping the library's choice"),
            ("MC_SLICE_TIMEOUT", "0", "from 1 to 65535; keeping 30"),
            ("MC_EFA_MERGE", "off", "keeping 1"),
            ("MC_LOG_LEVEL", "loud", "TRACE, INFO, WARNING, ERROR; keeping INFO"),
            ("MC_LOG_DIR", "/no/such/place", "a directory; keeping stderr"),
            ("MC_HANDSHAKE_PORT", "65536", "from 1 to 65535; keeping 12001"),
            ("MC_HANDSHAKE_CONNECT_TIMEOUT", "3600", "from 1 to 3599; keeping 5"),
            ("MC_HANDSHAKE_LISTEN_BACKLOG", "0", "keeping 128"),
            ("MC_HANDSHAKE_MAX_LENGTH", "1048575", "from 1048576 to 134217728; keeping 1048576"),
            ("MC_MIN_RPC_PORT", "1023", "keeping 15000, 17000"),
            ("MC_MIN_RPC_PORT", "17001", "keeping 15000, 17000"),
            ("MC_MAX_RPC_PORT", "32768", "keeping 15000, 17000"),
            ("MC_MAX_RPC_PORT", "60999", "keeping 15000, 17000"),
            ("MC_TE_METADATA_REFRESH_INTERVAL_SECONDS", "-1", "keeping never"),
            ("MC_TE_METRIC", "maybe", "off, on; keeping 0"),
        ];
        for (name, value, text) in table {
            let (config, warnings) = read(&[(name, value)]);
            assert_eq!(config, Config::default(), "{name}={value}");
            let [warning] = &warnings[..] else { panic!("{name}={value}: {warnings:?}") };
            for part in [name, value, text] {
                assert!(warning.contains(part), "{warning} lacks {part}");
            }
        }
    }

    #[test]
    fn a_good_port_does_not_save_a_bad_one() {
        let (config, warnings) = read(&[("MC_MIN_RPC_PORT", "2000"), ("MC_MAX_RPC_PORT", "x")]);
        assert_eq!(config.rpc_ports, 15000..=17000);
        assert_eq!(warnings.len(), 1);
    }

    #[test]
    fn the_right_spelling_of_a_port_goes_first() {
        let (config, _) = read(&[("MC_MIN_RPC_PORT", "2000"), ("MC_MIN_PRC_PORT", "3000")]);
        assert_eq!(config.rpc_ports, 2000..=17000);
    }

    #[test]
    fn a_switch_set_to_0_is_on_and_says_so() {
        for name in ["MC_LEGACY_RPC_PORT_BINDING", "MC_USE_IPV6", "MC_DISABLE_METACACHE"] {
            let (config, warnings) = read(&[(name, "0")]);
            assert_ne!(config, Config::default(), "{name}");
            let [warning] = &warnings[..] else { panic!("{name}: {warnings:?}") };
            assert!(warning.starts_with(&format!("{name}=\"0\" turns it on")), "{warning}");
        }
    }

    #[test]
    fn a_warning_is_one_line() {
        let (_, warnings) = read(&[("MC_MAX_WR", "1\n2")]);
        assert_eq!(warnings[0].lines().count(), 1);
    }

    proptest! {
        #[test]
        fn any_value_leaves_a_config_in_range(value in "[-+]?[0-9]{1,12}|[0-9a-z,/ ]*|\\PC*") {
            let (c, _) = Config::from_lookup(|_| Some(value.clone()));
            prop_assert!((1..=65535).contains(&c.max_cqe));
            prop_assert!((1..=65535).contains(&c.max_wr.unwrap_or(1)));
            prop_assert!((1..=127).contains(&c.retry_count));
            prop_assert!(c.slice_timeout > Duration::ZERO);
            prop_assert!(!c.rpc_ports.is_empty());
            prop_assert!(!c.provider.is_empty());
        }
    }
}
