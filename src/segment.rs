//! Mooncake's segment descriptor and handshake message, as JSON.
//!
//! Both come from the network, so what is read here is checked here. What is written is what
//! Mooncake's C++ writes for the protocol `efa`, key for key.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::topology::{
    MAX_NAME, Topology, bounded, check_name, limit, line, malformed, parse, printable,
};

/// The protocol of the segments that are understood.
pub const PROTOCOL: &str = "efa";
/// Most bytes of a segment descriptor as JSON text.
pub const MAX_TEXT: usize = 64 << 20;
/// Most devices of a segment.
pub const MAX_DEVICES: usize = 1024;
/// Most buffers of a segment.
pub const MAX_BUFFERS: usize = 1_000_000;
/// Most bytes of an endpoint address.
pub const MAX_ADDRESS: usize = 1024;
/// Most bytes of a handshake message as JSON text.
pub const MAX_HANDSHAKE: usize = 64 << 10;

/// What a process lets its peers know: its NICs, its registered memory, and how to reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Segment {
    /// Name of the segment; with peer-to-peer metadata, the `host:port` of the handshake.
    pub name: String,
    /// Always [`PROTOCOL`] in a segment that was read.
    pub protocol: String,
    /// The NICs. A buffer's keys are in the same order.
    #[serde(deserialize_with = "bounded::<_, _, MAX_DEVICES>")]
    pub devices: Vec<Device>,
    /// The registered memory.
    #[serde(deserialize_with = "bounded::<_, _, MAX_BUFFERS>")]
    pub buffers: Vec<Buffer>,
    /// Which NICs are near which memory.
    #[serde(rename = "priority_matrix")]
    pub topology: Topology,
    /// Server name in the paths of this segment's NICs, where it is not `name`; else empty.
    pub rdma_server_name: String,
}

/// One NIC of a segment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    /// Never empty. An [`encode_gid`] address from peers of our kind, free text from others.
    pub gid: String,
    /// Not used by EFA.
    pub lid: u16,
    /// The NIC's name. Never empty.
    pub name: String,
}

/// One piece of registered memory of a segment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Buffer {
    /// Address of the first byte in its process. Never 0.
    pub addr: u64,
    /// Size in bytes. Never 0.
    pub length: u64,
    /// Local keys, for the owner only. See `rkey`.
    #[serde(deserialize_with = "bounded::<_, _, MAX_DEVICES>")]
    pub lkey: Vec<u64>,
    /// Location of the memory, such as `cpu:0` or `cuda:3`. Never empty.
    pub name: String,
    /// Remote keys, one for each device, 0 where the buffer is not registered on it. Empty, which
    /// Mooncake allows, where another transport than EFA registered the buffer.
    #[serde(deserialize_with = "bounded::<_, _, MAX_DEVICES>")]
    pub rkey: Vec<u64>,
}

/// [`Segment`] as JSON; the keys in Mooncake's order.
#[derive(Serialize)]
struct SegmentJson<'a> {
    buffers: &'a [Buffer],
    devices: &'a [Device],
    name: &'a str,
    priority_matrix: &'a Topology,
    protocol: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    rdma_server_name: &'a str,
    tcp_data_port: u16,
    tcp_proto_version: u8,
    timestamp: &'a str,
}

impl Segment {
    /// The descriptor as JSON, stamped with the time of now.
    pub fn to_json(&self) -> String {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.to_json_at(&timestamp(now))
    }

    fn to_json_at(&self, timestamp: &str) -> String {
        let json = SegmentJson {
            buffers: &self.buffers,
            devices: &self.devices,
            name: &self.name,
            priority_matrix: &self.topology,
            protocol: &self.protocol,
            rdma_server_name: &self.rdma_server_name,
            // No TCP data port is served; 1 is the version that peers assume without one.
            tcp_data_port: 0,
            tcp_proto_version: 1,
            timestamp,
        };
        serde_json::to_string(&json).expect("strings and numbers have a JSON form")
    }

    /// Reads and checks a descriptor. Fields that are not known are ignored.
    pub fn from_json(text: &str) -> Result<Self> {
        let segment: Self = parse("segment descriptor", text, MAX_TEXT)?;
        segment
            .check()
            .map_err(|e| e.context(format!("segment '{}'", printable(&segment.name))))?;
        Ok(segment)
    }

    /// Name of the server in the paths of this segment's NICs.
    pub fn server_name(&self) -> &str {
        if self.rdma_server_name.is_empty() { &self.name } else { &self.rdma_server_name }
    }

    /// Applies the checks that [`Self::from_json`] makes to a descriptor that came another way.
    pub fn check(&self) -> Result<()> {
        for (what, text) in [("name", &self.name), ("rdma_server_name", &self.rdma_server_name)] {
            line(what, text)?;
        }
        for (what, count, most) in [
            ("devices", self.devices.len(), MAX_DEVICES),
            ("buffers", self.buffers.len(), MAX_BUFFERS),
        ] {
            if count > most {
                return Err(malformed(format!("{count} {what}, at most {most} allowed")));
            }
        }
        if self.protocol != PROTOCOL {
            let protocol = printable(&self.protocol);
            return Err(malformed(format!("protocol '{protocol}', only '{PROTOCOL}' is known")));
        }
        for (i, device) in self.devices.iter().enumerate() {
            device.check().map_err(|e| e.context(format!("device {i}")))?;
        }
        for (i, buffer) in self.buffers.iter().enumerate() {
            buffer.check(self.devices.len()).map_err(|e| e.context(format!("buffer {i}")))?;
        }
        self.topology.check().map_err(|e| e.context("priority_matrix"))
    }
}

impl Device {
    fn check(&self) -> Result<()> {
        check_name("NIC", &self.name)?;
        check_name("gid", &self.gid)
    }
}

impl Buffer {
    fn check(&self, devices: usize) -> Result<()> {
        let (addr, length, rkeys, lkeys) =
            (self.addr, self.length, self.rkey.len(), self.lkey.len());
        check_name("location", &self.name)?;
        if addr == 0 || length == 0 {
            return Err(malformed(format!(
                "address {addr:#x} and length {length}, neither may be 0"
            )));
        }
        if addr.checked_add(length).is_none() {
            return Err(malformed(format!(
                "address {addr:#x} and length {length} run past the last address"
            )));
        }
        if rkeys > 0 && rkeys != devices {
            return Err(malformed(format!("{rkeys} rkeys for {devices} devices")));
        }
        if rkeys > 0 && lkeys != rkeys {
            return Err(malformed(format!("{rkeys} rkeys and {lkeys} lkeys")));
        }
        Ok(())
    }
}

/// `2026-08-22 13:37:00.123456`, in UTC: the local time, which Mooncake writes, would need libc.
/// Nobody acts on it.
fn timestamp(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (day, second) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Days to a civil date, in years that begin in March (Howard Hinnant's `civil_from_days`).
    let day = day + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day + 2) / 153;
    let day = day - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    let year = 400 * era + year + i64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    let micros = since_epoch.subsec_micros();
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
}

const GID_MARK: &str = "mefa1:";

/// A NIC's endpoint address in the form that fits a device's `gid`: `mefa1:PROVIDER:HEX`. C++ peers
/// want the `gid` to be non-empty and do not look at it otherwise.
pub fn encode_gid(provider: &str, address: &[u8]) -> String {
    format!("{GID_MARK}{provider}:{}", hex_encode(address))
}

/// Provider and address of an [`encode_gid`] text; `None` if it is a C++ peer's, or malformed.
pub fn decode_gid(gid: &str) -> Option<(&str, Vec<u8>)> {
    let (provider, hex) = gid.strip_prefix(GID_MARK)?.rsplit_once(':')?;
    let address = hex_decode(hex)?;
    let sound = !provider.is_empty() && (1..=MAX_ADDRESS).contains(&address.len());
    sound.then_some((provider, address))
}

/// The message by which two NICs learn each other's addresses; request and reply are alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Handshake {
    /// [`nic_path`] of the sender.
    pub local_nic_path: String,
    /// [`nic_path`] of the receiver, who refuses what is not for it.
    pub peer_nic_path: String,
    /// Why the receiver refuses; empty in a request and on success.
    pub reply_msg: String,
    /// The sender's endpoint address in hexadecimal digits; empty in a refusal.
    pub efa_addr: String,
}

/// [`Handshake`] as JSON; the keys in Mooncake's order.
#[derive(Serialize)]
struct HandshakeJson<'a> {
    efa_addr: &'a str,
    local_gid: &'a str,
    local_lid: u16,
    local_nic_path: &'a str,
    payload: &'a str,
    peer_nic_path: &'a str,
    qp_num: [u32; 0],
    reply_msg: &'a str,
}

impl Handshake {
    /// The message as JSON.
    pub fn to_json(&self) -> String {
        let json = HandshakeJson {
            efa_addr: &self.efa_addr,
            local_gid: "",
            local_lid: 0,
            local_nic_path: &self.local_nic_path,
            payload: "",
            peer_nic_path: &self.peer_nic_path,
            qp_num: [],
            reply_msg: &self.reply_msg,
        };
        serde_json::to_string(&json).expect("strings and numbers have a JSON form")
    }

    /// Reads and checks a message. Fields that are not known are ignored.
    pub fn from_json(text: &str) -> Result<Self> {
        let message: Self = parse("handshake", text, MAX_HANDSHAKE)?;
        message.check().map_err(|e| {
            e.context(format!("handshake from '{}'", printable(&message.local_nic_path)))
        })?;
        Ok(message)
    }

    fn check(&self) -> Result<()> {
        line("local_nic_path", &self.local_nic_path)?;
        line("peer_nic_path", &self.peer_nic_path)?;
        limit("reply_msg", &self.reply_msg, MAX_NAME)?;
        limit("efa_addr", &self.efa_addr, 2 * MAX_ADDRESS)?;
        if hex_decode(&self.efa_addr).is_none() {
            return Err(malformed("efa_addr: not pairs of hexadecimal digits".into()));
        }
        Ok(())
    }
}

/// The name of a NIC among all hosts: `host:port@nic`.
pub fn nic_path(server: &str, nic: &str) -> String {
    format!("{server}@{nic}")
}

/// The NIC of a [`nic_path`]; `None` if it names none.
pub fn nic_of_path(path: &str) -> Option<&str> {
    path.split_once('@').map(|(_, nic)| nic).filter(|nic| !nic.is_empty())
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex_encode(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String succeeds");
        text
    })
}

/// Bytes from hexadecimal digits of either case; `None` for an odd number of them, or another
/// character.
pub fn hex_decode(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| char::from(c).to_digit(16);
    if text.len() % 2 != 0 {
        return None;
    }
    let pairs = text.as_bytes().chunks_exact(2);
    pairs.map(|pair| Some((digit(pair[0])? * 16 + digit(pair[1])?) as u8)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::error::Code;
    use crate::topology::Entry;

    /// What Mooncake (main at 3b5a594) itself printed for a segment of two NICs.
    const SEGMENT: &str = concat!(
        r#"{"buffers":[{"addr":18446744073709547520,"length":4095,"lkey":[1,0],"name":"cuda:3","#,
        r#""rkey":[18446744073709551615,0]}],"#,
        r#""devices":[{"gid":"fe80::1","lid":0,"name":"rdmap0s6"},"#,
        r#"{"gid":"mefa1:efa:00ff","lid":7,"name":"rdmap1s6"}],"name":"10.0.0.1:15001","#,
        r#""priority_matrix":{"cpu:0":[["rdmap0s6"],["rdmap1s6"]]},"protocol":"efa","#,
        r#""tcp_data_port":0,"tcp_proto_version":1,"timestamp":"2026-08-22 13:37:00.000042"}"#,
    );

    fn segment() -> Segment {
        let device =
            |name: &str, lid, gid: &str| Device { name: name.into(), lid, gid: gid.into() };
        Segment {
            name: "10.0.0.1:15001".into(),
            protocol: "efa".into(),
            devices: vec![
                device("rdmap0s6", 0, "fe80::1"),
                device("rdmap1s6", 7, "mefa1:efa:00ff"),
            ],
            buffers: vec![Buffer {
                name: "cuda:3".into(),
                addr: u64::MAX - 4095,
                length: 4095,
                rkey: vec![u64::MAX, 0],
                lkey: vec![1, 0],
            }],
            topology: Topology {
                entries: [(
                    "cpu:0".into(),
                    Entry {
                        preferred: vec!["rdmap0s6".into()],
                        available: vec!["rdmap1s6".into()],
                    },
                )]
                .into(),
            },
            rdma_server_name: String::new(),
        }
    }

    #[test]
    fn a_segment_is_written_as_mooncake_does() {
        assert_eq!(segment().to_json_at("2026-08-22 13:37:00.000042"), SEGMENT);
        let named = Segment { rdma_server_name: "nic-host:1".into(), ..segment() };
        assert!(named.to_json().contains(r#","rdma_server_name":"nic-host:1","#));
    }

    #[test]
    fn a_segment_is_read_back() {
        assert_eq!(Segment::from_json(SEGMENT).unwrap(), segment());
        assert_eq!(Segment::from_json(&segment().to_json()).unwrap(), segment());
    }

    #[test]
    fn what_mooncake_accepts_is_accepted() {
        let bare = Segment { protocol: "efa".into(), ..Segment::default() };
        for text in [
            r#"{"protocol":"efa"}"#,
            r#" {"protocol":"efa","priority_matrix":null,"later_field":[{"x":[1.5]}]}"#,
        ] {
            assert_eq!(Segment::from_json(text).unwrap(), bare);
        }
        let keyless = SEGMENT.replace("18446744073709551615,0", "");
        assert!(Segment::from_json(&keyless).unwrap().buffers[0].rkey.is_empty());
    }

    #[test]
    fn the_server_name_is_the_name_unless_given() {
        let mut segment = segment();
        assert_eq!(segment.server_name(), "10.0.0.1:15001");
        segment.rdma_server_name = "nic-host:1".into();
        assert_eq!(Segment::from_json(&segment.to_json()).unwrap().server_name(), "nic-host:1");
    }

    /// That `text` is refused in one short line that begins with `start` and contains `part`.
    fn refused<T: std::fmt::Debug>(result: Result<T>, start: &str, part: &str) {
        let error = result.unwrap_err();
        assert_eq!(error.code, Code::MalformedJson);
        assert!(error.text.starts_with(start), "{error} does not begin with {start}");
        assert!(error.text.contains(part), "{error} lacks {part}");
        assert!(error.text.len() < 500 && error.text.lines().count() == 1, "{error}");
    }

    #[test]
    fn a_bad_segment_is_refused_with_what_and_where() {
        let long = "n".repeat(MAX_NAME + 1);
        let table: &[(&str, &str, &str)] = &[
            (r#"[18446744073709551615,0]"#, "[1]", "buffer 0: 1 rkeys for 2 devices"),
            (r#"[18446744073709551615,0]"#, "[1,2,3]", "buffer 0: 3 rkeys for 2 devices"),
            (r#""lkey":[1,0]"#, r#""lkey":[1]"#, "buffer 0: 2 rkeys and 1 lkeys"),
            (
                r#""length":4095"#,
                r#""length":4096"#,
                "buffer 0: address 0xfffffffffffff000 and len",
            ),
            (r#""length":4095"#, r#""length":0"#, "and length 0, neither may be 0"),
            ("18446744073709547520", "0", "address 0x0 and length 4095, neither may be 0"),
            (r#""name":"cuda:3""#, r#""name":"""#, "buffer 0: location: empty"),
            ("cuda:3", &long, "buffer 0: location: 4097 bytes"),
            (r#""gid":"mefa1:efa:00ff""#, r#""gid":"""#, "device 1: gid: empty"),
            (r#""gid":"fe80::1","#, "", "device 0: gid: empty"),
            ("fe80::1", &long, "device 0: gid: 4097 bytes"),
            (r#""name":"rdmap1s6""#, r#""name":"""#, "device 1: NIC: empty"),
            (r#""protocol":"efa""#, r#""protocol":"tcp""#, "protocol 'tcp', only 'efa' is known"),
            (r#""protocol":"efa","#, "", "protocol '', only 'efa' is known"),
            (r#""cpu:0":"#, r#""":"#, "priority_matrix: location: empty"),
            ("10.0.0.1:15001", &long, "name: 4097 bytes, at most 4096 allowed"),
            ("10.0.0.1:15001", r"a\nb", r"'a?b': name: has the control character '\n'"),
            ("fe80::1", r"a\u0000", r"device 0: gid: has the control character '\0'"),
            (
                r#""name":"rdmap1s6""#,
                r#""name":"\u001b[2J""#,
                "device 1: NIC: has the control char",
            ),
            ("cuda:3", r"\u0085", "buffer 0: location: has the control character"),
        ];
        for (from, to, part) in table {
            assert!(SEGMENT.contains(from), "{from}");
            refused(Segment::from_json(&SEGMENT.replace(from, to)), "segment '", part);
        }
        refused(
            Segment::from_json(
                r#"{"protocol":"efa","rdma_server_name":"LONG"}"#.replace("LONG", &long).as_str(),
            ),
            "segment '': rdma_server_name: 4097 bytes",
            "",
        );
    }

    #[test]
    fn text_that_is_no_segment_is_refused_with_the_place() {
        let table: &[(&str, &str, &str)] = &[
            ("18446744073709547520", "18446744073709551616", "line 1, column 40: invalid type"),
            ("18446744073709547520", "-1", "line 1, column 22: invalid value: integer `-1`"),
            (r#""lid":7"#, r#""lid":65536"#, "invalid value: integer `65536`, expected u16"),
            (r#"["rdmap1s6"]]"#, "]", "line 1"),
            (r#""devices":["#, r#""devices":7,"x":["#, "expected a list of at most 1024 elements"),
            (r#""name":"cuda:3""#, r#""name":3"#, "invalid type: integer `3`, expected a string"),
        ];
        for (from, to, part) in table {
            assert!(SEGMENT.contains(from), "{from}");
            refused(Segment::from_json(&SEGMENT.replace(from, to)), "segment descriptor: ", part);
        }
        for text in ["", "[]", "null", "7"] {
            refused(Segment::from_json(text), "segment descriptor: not a JSON object", "");
        }
    }

    #[test]
    fn limits_hold_while_reading() {
        let list = |element: &str, n| vec![element; n].join(",");
        let segment = |key: &str, list: String| {
            Segment::from_json(&format!(r#"{{"protocol":"efa","{key}":[{list}]}}"#))
        };
        let device = r#"{"name":"n","gid":"g"}"#;
        assert!(segment("devices", list(device, MAX_DEVICES)).is_ok());
        refused(
            segment("devices", list(device, MAX_DEVICES + 1)),
            "seg",
            "more than 1024 elements",
        );
        let buffer = r#"{"name":"n","addr":1,"length":1}"#;
        assert!(segment("buffers", list(buffer, MAX_BUFFERS)).is_ok());
        refused(segment("buffers", list(buffer, MAX_BUFFERS + 1)), "seg", "more than 1000000 elem");
        for keys in ["rkey", "lkey"] {
            let buffer = format!(r#"{{"{keys}":[{}]}}"#, list("1", MAX_DEVICES + 1));
            refused(segment("buffers", buffer), "segment desc", "more than 1024 elements");
        }
        let text = format!("{{{}}}", " ".repeat(MAX_TEXT - 1));
        refused(Segment::from_json(&text), "segment descriptor: 67108865 bytes, at most", "");
    }

    #[test]
    fn limits_hold_for_what_was_not_read() {
        let many = Segment { devices: vec![Device::default(); MAX_DEVICES + 1], ..segment() };
        refused(many.check(), "1025 devices, at most 1024", "");
        let many = Segment { buffers: vec![Buffer::default(); MAX_BUFFERS + 1], ..segment() };
        refused(many.check(), "1000001 buffers, at most 1000000", "");
    }

    #[test]
    fn timestamps_are_civil_dates() {
        for (seconds, micros, text) in [
            (0, 0, "1970-01-01 00:00:00.000000"),
            (951_782_399, 999_999, "2000-02-28 23:59:59.999999"),
            (951_782_400, 1, "2000-02-29 00:00:00.000001"),
            (951_868_800, 0, "2000-03-01 00:00:00.000000"),
            (1_787_405_820, 42, "2026-08-22 13:37:00.000042"),
            (4_107_542_400, 0, "2100-03-01 00:00:00.000000"),
        ] {
            assert_eq!(timestamp(Duration::new(seconds, micros * 1000)), text);
        }
    }

    #[test]
    fn a_gid_carries_an_address() {
        assert_eq!(encode_gid("efa", &[0xfe, 0x80, 1]), "mefa1:efa:fe8001");
        assert_eq!(decode_gid("mefa1:efa:fe8001"), Some(("efa", vec![0xfe, 0x80, 1])));
        assert_eq!(decode_gid("mefa1:tcp;ofi_rxm:00"), Some(("tcp;ofi_rxm", vec![0])));
        let longest = encode_gid("efa", &[7; MAX_ADDRESS]);
        assert_eq!(decode_gid(&longest), Some(("efa", vec![7; MAX_ADDRESS])));
        let too_long = encode_gid("efa", &[7; MAX_ADDRESS + 1]);
        for gid in [
            "",
            "fe80:0000:0000:0000:0000:0000:0000:0001",
            "mefa2:efa:00",
            "mefa1:efa",
            "mefa1:efa:",
            "mefa1::00",
            "mefa1:efa:0",
            "mefa1:efa:0g",
            &too_long,
        ] {
            assert_eq!(decode_gid(gid), None, "{gid}");
        }
    }

    const HANDSHAKE: &str = concat!(
        r#"{"efa_addr":"fe80","local_gid":"","local_lid":0,"local_nic_path":"a:1@x","#,
        r#""payload":"","peer_nic_path":"b:2@y","qp_num":[],"reply_msg":"no"}"#,
    );

    #[test]
    fn a_handshake_is_written_and_read_as_mooncake_does() {
        let message = Handshake {
            local_nic_path: "a:1@x".into(),
            peer_nic_path: "b:2@y".into(),
            reply_msg: "no".into(),
            efa_addr: "fe80".into(),
        };
        assert_eq!(message.to_json(), HANDSHAKE);
        assert_eq!(Handshake::from_json(HANDSHAKE).unwrap(), message);
        assert_eq!(Handshake::from_json("{}").unwrap(), Handshake::default());
    }

    #[test]
    fn a_bad_handshake_is_refused() {
        let name = "n".repeat(MAX_NAME + 1);
        let address = "00".repeat(MAX_ADDRESS + 1);
        let longest = HANDSHAKE.replace("fe80", &address[2..]);
        assert!(Handshake::from_json(&longest).is_ok());
        for (from, to, part) in [
            ("fe80", "fe8", "'a:1@x': efa_addr: not pairs of hexadecimal digits"),
            ("fe80", "fe8x", "efa_addr: not pairs of hexadecimal digits"),
            ("fe80", &address, "efa_addr: 2050 bytes, at most 2048 allowed"),
            ("a:1@x", &name, "local_nic_path: 4097 bytes"),
            ("b:2@y", &name, "peer_nic_path: 4097 bytes"),
            ("no", &name, "reply_msg: 4097 bytes"),
            ("a:1@x", r"a:1\r", r"'a:1?': local_nic_path: has the control character '\r'"),
            ("b:2@y", r"b:2\u0000", r"peer_nic_path: has the control character '\0'"),
        ] {
            refused(Handshake::from_json(&HANDSHAKE.replace(from, to)), "handshake from '", part);
        }
        refused(Handshake::from_json("[]"), "handshake: not a JSON object", "");
        let text = format!("{{{}}}", " ".repeat(MAX_HANDSHAKE - 1));
        refused(Handshake::from_json(&text), "handshake: 65537 bytes, at most 65536", "");
    }

    #[test]
    fn a_nic_path_is_server_and_nic() {
        assert_eq!(nic_path("host:1", "rdmap0s6"), "host:1@rdmap0s6");
        assert_eq!(nic_of_path("host:1@rdmap0s6"), Some("rdmap0s6"));
        assert_eq!(nic_of_path("host:1@a@b"), Some("a@b"));
        assert_eq!(nic_of_path("host:1@"), None);
        assert_eq!(nic_of_path("host:1"), None);
    }

    #[test]
    fn hex_is_lower_case_and_exact() {
        assert_eq!(hex_encode(&[0, 0x9a, 0xff]), "009aff");
        assert_eq!(hex_decode("009aFf"), Some(vec![0, 0x9a, 0xff]));
        assert_eq!(hex_decode(""), Some(vec![]));
        for text in ["0", "0g", "+1", " 1", "000", "é"] {
            assert_eq!(hex_decode(text), None, "{text}");
        }
    }

    fn any_segment() -> impl Strategy<Value = Segment> {
        let device = ("\\PC{1,8}", any::<u16>(), "\\PC{1,8}").prop_map(|(name, lid, gid)| Device {
            name,
            lid,
            gid,
        });
        let devices = vec(device, 0..4);
        devices.prop_flat_map(|devices| {
            let keys = || vec(any::<u64>(), devices.len());
            let buffer =
                ("\\PC{1,8}", 1..=u64::MAX / 2, 1..=u64::MAX / 2, keys(), keys()).prop_map(
                    |(name, addr, length, rkey, lkey)| Buffer { name, addr, length, rkey, lkey },
                );
            (Just(devices), vec(buffer, 0..4), "\\PC*", "\\PC*").prop_map(
                |(devices, buffers, name, rdma_server_name)| Segment {
                    name,
                    protocol: PROTOCOL.into(),
                    topology: Topology::flat(
                        &devices.iter().map(|d| d.name.clone()).collect::<Vec<_>>(),
                    ),
                    devices,
                    buffers,
                    rdma_server_name,
                },
            )
        })
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let key = || {
            prop::sample::select(vec![
                "name",
                "protocol",
                "devices",
                "buffers",
                "gid",
                "lid",
                "addr",
                "length",
                "rkey",
                "lkey",
                "priority_matrix",
                "cpu:0",
                "efa_addr",
                "reply_msg",
            ])
        };
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            Just("efa".into()),
            "\\PC{0,8}".prop_map(Into::into),
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::btree_map(key().prop_map(String::from), inner, 0..6)
                    .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_segment_survives_a_round_trip(segment in any_segment()) {
            prop_assert_eq!(Segment::from_json(&segment.to_json()).unwrap(), segment);
        }

        #[test]
        fn a_handshake_survives_a_round_trip(
            local_nic_path in "\\PC*", peer_nic_path in "\\PC*", reply_msg in "\\PC*",
            address in vec(any::<u8>(), 0..64),
        ) {
            let efa_addr = hex_encode(&address);
            let message = Handshake { local_nic_path, peer_nic_path, reply_msg, efa_addr };
            prop_assert_eq!(Handshake::from_json(&message.to_json()).unwrap(), message);
        }

        #[test]
        fn hex_and_gids_survive_a_round_trip(
            provider in "[a-z;_:]{1,8}", address in vec(any::<u8>(), 1..64),
        ) {
            prop_assert_eq!(hex_decode(&hex_encode(&address)), Some(address.clone()));
            let gid = encode_gid(&provider, &address);
            prop_assert_eq!(decode_gid(&gid), Some((&*provider, address)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*|[{}\\[\\]\",:a0]*") {
            let _ = Segment::from_json(&text);
            let _ = Handshake::from_json(&text);
            let _ = Segment::from_json(&format!("{{\"protocol\":\"efa\",\"buffers\":{text}}}"));
            let _ = decode_gid(&text);
            let _ = decode_gid(&format!("{GID_MARK}{text}"));
            let _ = hex_decode(&text);
            let _ = nic_of_path(&text);
        }

        #[test]
        fn any_json_is_read_or_refused(mut json in any_json()) {
            let _ = Handshake::from_json(&json.to_string());
            let _ = Topology::from_json(&json.to_string());
            if let Some(map) = json.as_object_mut() {
                map.insert("protocol".into(), "efa".into());
            }
            // What is accepted stays the same when it is written and read again.
            if let Ok(segment) = Segment::from_json(&json.to_string()) {
                prop_assert_eq!(Segment::from_json(&segment.to_json()).unwrap(), segment);
            }
        }
    }
}
