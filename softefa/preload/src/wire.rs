//! The descriptors that pass between software and an EFA device, bit by bit as rdma-core's
//! `providers/efa/efa_io_defs.h` has them. Little-endian, as the device is.

/// Completion statuses of the device (`efa_io_comp_status`), which libfabric decides by.
pub mod status {
    pub const OK: u8 = 0;
    pub const UNSUPPORTED: u8 = 3;
    pub const BAD_AH: u8 = 4;
    pub const BAD_LKEY: u8 = 5;
    pub const LOCAL_LENGTH: u8 = 6;
    pub const REMOTE_ADDRESS: u8 = 7;
    pub const BAD_QPN: u8 = 9;
    pub const RNR: u8 = 10;
    pub const REMOTE_LENGTH: u8 = 11;
    pub const UNRESPONSIVE: u8 = 13;
    pub const UNKNOWN_PEER: u8 = 14;
    pub const UNREACHABLE: u8 = 15;
}

/// Operations of a send queue.
pub const SEND: u8 = 0;
pub const READ: u8 = 1;
pub const WRITE: u8 = 2;

/// Bytes that fit into a send descriptor.
pub const INLINE: usize = 32;
/// An address handle number that names nobody.
pub const NO_AH: u16 = 0xffff;

/// A send queue's descriptor, `efa_io_tx_wqe`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Default)]
pub struct TxWqe {
    req_id: u16,
    ctrl1: u8,
    ctrl2: u8,
    pub dest_qp: u16,
    /// Buffers, or bytes if inline.
    pub length: u16,
    pub imm: u32,
    pub ah: u16,
    _ctrl3: u8,
    _reserved: u8,
    pub qkey: u32,
    _reserved2: [u8; 6],
    req_id_ex: [u16; 3],
    data: [u64; 4],
}

/// A piece of memory of this side.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub lkey: u32,
}

const KEY: u64 = 0xff_ffff;

impl TxWqe {
    /// `signalled`: to be reported when done.
    pub fn new(op: u8, id: u64, signalled: bool) -> TxWqe {
        TxWqe {
            req_id: id as u16,
            req_id_ex: [(id >> 16) as u16, (id >> 32) as u16, (id >> 48) as u16],
            ctrl1: 1 << 7 | op,
            ctrl2: 1 << 2 | 1 << 3 | u8::from(signalled) << 4,
            ..TxWqe::default()
        }
    }
    pub fn op(&self) -> u8 {
        self.ctrl1 & 15
    }
    pub fn has_imm(&self) -> bool {
        self.ctrl1 & 1 << 4 != 0
    }
    pub fn is_inline(&self) -> bool {
        self.ctrl1 & 1 << 5 != 0
    }
    pub fn is_signalled(&self) -> bool {
        self.ctrl2 & 1 << 4 != 0
    }
    pub fn set_imm(&mut self, imm: u32) {
        self.imm = imm;
        self.ctrl1 |= 1 << 4;
    }
    pub fn set_remote(&mut self, address: u64, rkey: u32) {
        self.data[0] = u64::from(rkey) << 32;
        self.data[1] = address;
    }
    /// Address and key on the other side.
    pub fn remote(&self) -> (u64, u32) {
        (self.data[1], (self.data[0] >> 32) as u32)
    }
    fn first_buffer(&self) -> usize {
        if self.op() == SEND { 0 } else { 2 }
    }
    /// One buffer more. False: the descriptor holds no more (2 for a send, 1 otherwise).
    pub fn push_buffer(&mut self, buffer: Buffer) -> bool {
        let at = self.first_buffer() + 2 * usize::from(self.length);
        if at + 1 >= self.data.len() || self.is_inline() {
            return false;
        }
        self.data[at] = u64::from(buffer.length) | (u64::from(buffer.lkey) & KEY) << 32;
        self.data[at + 1] = buffer.address;
        self.length += 1;
        true
    }
    /// Its buffers; none if inline.
    pub fn buffers(&self) -> impl Iterator<Item = Buffer> + '_ {
        let n = if self.is_inline() { 0 } else { usize::from(self.length) };
        self.data[self.first_buffer()..].chunks_exact(2).take(n).map(|words| Buffer {
            address: words[1],
            length: words[0] as u32,
            lkey: (words[0] >> 32 & KEY) as u32,
        })
    }
    /// Appends inline data. False: it does not fit.
    pub fn push_inline(&mut self, bytes: &[u8]) -> bool {
        self.ctrl1 |= 1 << 5;
        let from = usize::from(self.length);
        if self.op() != SEND || from + bytes.len() > INLINE {
            return false;
        }
        let mut all = self.inline();
        all[from..from + bytes.len()].copy_from_slice(bytes);
        for (word, bytes) in self.data.iter_mut().zip(all.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        }
        self.length += bytes.len() as u16;
        true
    }
    /// Inline data: `length` bytes of these count.
    pub fn inline(&self) -> [u8; INLINE] {
        let mut all = [0; INLINE];
        for (to, word) in all.chunks_exact_mut(8).zip(self.data) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        all
    }
}

/// A receive queue's descriptor, `efa_io_rx_desc`; a request is one or more of these.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RxDesc {
    address_lo: u32,
    address_hi: u32,
    pub req_id: u16,
    pub length: u16,
    lkey_ctrl: u32,
}

impl RxDesc {
    pub fn new(req_id: u16, buffer: Buffer, first: bool, last: bool) -> RxDesc {
        RxDesc {
            address_lo: buffer.address as u32,
            address_hi: (buffer.address >> 32) as u32,
            req_id,
            length: buffer.length.min(u32::from(u16::MAX)) as u16,
            lkey_ctrl: buffer.lkey & KEY as u32 | u32::from(first) << 30 | u32::from(last) << 31,
        }
    }
    pub fn address(&self) -> u64 {
        u64::from(self.address_hi) << 32 | u64::from(self.address_lo)
    }
    pub fn lkey(&self) -> u32 {
        self.lkey_ctrl & KEY as u32
    }
    pub fn is_last(&self) -> bool {
        self.lkey_ctrl >> 31 != 0
    }
}

const Q_SEND: u8 = 1;
const Q_RECV: u8 = 2;

/// A completion queue's entry, `efa_io_tx_cdesc` and `efa_io_rx_cdesc_ex` in one.
#[repr(C, align(32))]
#[derive(Clone, Copy, Default)]
pub struct Cdesc {
    pub req_id: u16,
    pub status: u8,
    /// Last to be written: its phase bit says that the rest is there.
    flags: u8,
    pub qp: u16,
    // Of a send the rest of its 64-bit id; of a receive length, address handle and source.
    words: [u16; 3],
    pub imm: u32,
    tail: [u8; 16],
}

impl Cdesc {
    pub fn sent(qp: u16, wqe: &TxWqe, status: u8) -> Cdesc {
        Cdesc {
            req_id: wqe.req_id,
            status,
            flags: Q_SEND << 1 | wqe.op() << 4,
            qp,
            words: wqe.req_id_ex,
            ..Cdesc::default()
        }
    }
    /// `source`: address handle number, queue pair and GID of the sender.
    pub fn received(
        qp: u16,
        op: u8,
        length: u32,
        imm: Option<u32>,
        source: (u16, u16, [u8; 16]),
    ) -> Cdesc {
        let (ah, source_qp, gid) = source;
        let mut tail = gid;
        if ah != NO_AH {
            tail = [0; 16];
            if op == WRITE {
                tail[..2].copy_from_slice(&((length >> 16) as u16).to_le_bytes());
            }
        }
        Cdesc {
            flags: Q_RECV << 1 | u8::from(imm.is_some()) << 3 | op << 4,
            qp,
            words: [length as u16, ah, source_qp],
            imm: imm.unwrap_or(0),
            tail,
            ..Cdesc::default()
        }
    }
    pub fn set_unsolicited(&mut self) {
        self.flags |= 1 << 7;
    }
    pub fn is_unsolicited(&self) -> bool {
        self.flags & 1 << 7 != 0
    }
    pub fn is_receive(&self) -> bool {
        self.flags >> 1 & 3 == Q_RECV
    }
    pub fn has_imm(&self) -> bool {
        self.flags & 1 << 3 != 0
    }
    pub fn op(&self) -> u8 {
        self.flags >> 4 & 7
    }
    /// The id that the send was posted with.
    pub fn send_id(&self) -> u64 {
        let [a, b, c] = self.words.map(u64::from);
        u64::from(self.req_id) | a << 16 | b << 32 | c << 48
    }
    pub fn length(&self) -> u32 {
        let high = if self.op() == WRITE && self.ah() != NO_AH {
            u32::from(u16::from_le_bytes([self.tail[0], self.tail[1]])) << 16
        } else {
            0
        };
        u32::from(self.words[0]) | high
    }
    pub fn ah(&self) -> u16 {
        self.words[1]
    }
    pub fn source_qp(&self) -> u16 {
        self.words[2]
    }
    /// The sender's GID, which is there if its address handle is unknown.
    pub fn source_gid(&self) -> Option<[u8; 16]> {
        (self.ah() == NO_AH).then_some(self.tail)
    }
    pub fn with_phase(mut self, phase: u8) -> Cdesc {
        self.flags = self.flags & !1 | phase;
        self
    }
    pub const FLAGS_OFFSET: usize = std::mem::offset_of!(Cdesc, flags);
}

const _: () =
    assert!(size_of::<TxWqe>() == 64 && size_of::<RxDesc>() == 16 && size_of::<Cdesc>() == 32);

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes<T>(value: &T) -> &[u8] {
        // SAFETY: a plain value without padding.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
    }

    /// Offsets and bits of rdma-core's efa_io_defs.h, written out by hand.
    #[test]
    fn descriptors_are_the_devices() {
        let mut wqe = TxWqe::new(WRITE, 0x8877_6655_4433_2211, true);
        wqe.dest_qp = 0x0102;
        wqe.set_imm(0xa1b2_c3d4);
        wqe.ah = 0x0304;
        wqe.qkey = 0x0506_0708;
        wqe.set_remote(0x1020_3040_5060_7080, 0x00ab_cdef);
        assert!(wqe.push_buffer(Buffer { address: 0xd, length: 9, lkey: 0xff01_0203 }));
        assert!(!wqe.push_buffer(Buffer { address: 0, length: 0, lkey: 0 }));
        let b = bytes(&wqe);
        assert_eq!(b[..4], [0x11, 0x22, 0x92, 0x1c]);
        assert_eq!(b[4..12], [2, 1, 1, 0, 0xd4, 0xc3, 0xb2, 0xa1]);
        assert_eq!(b[12..20], [4, 3, 0, 0, 8, 7, 6, 5]);
        assert_eq!(b[26..32], [0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
        assert_eq!(
            b[36..48],
            [0xef, 0xcd, 0xab, 0, 0x80, 0x70, 0x60, 0x50, 0x40, 0x30, 0x20, 0x10]
        );
        assert_eq!(b[48..60], [9, 0, 0, 0, 3, 2, 1, 0, 0xd, 0, 0, 0]);
        let rx = RxDesc::new(
            0x0102,
            Buffer { address: 0x1_0000_0002, length: 70_000, lkey: 7 },
            true,
            true,
        );
        assert_eq!(bytes(&rx), [2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 0xff, 0xff, 7, 0, 0, 0xc0]);
        let tx = Cdesc::sent(0x0506, &wqe, 13).with_phase(1);
        assert_eq!(
            bytes(&tx)[..12],
            [0x11, 0x22, 13, 0x23, 6, 5, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]
        );
        assert_eq!(tx.send_id(), 0x8877_6655_4433_2211);
        let mut rx = Cdesc::received(3, WRITE, 0x0012_3456, Some(9), (7, 8, [0xee; 16]));
        rx.set_unsolicited();
        assert_eq!(bytes(&rx)[3..18], [0xac, 3, 0, 0x56, 0x34, 7, 0, 8, 0, 9, 0, 0, 0, 0x12, 0]);
        assert_eq!((rx.length(), rx.source_gid()), (0x0012_3456, None));
        let unknown = Cdesc::received(3, SEND, 5, None, (NO_AH, 8, [0xee; 16]));
        assert_eq!((unknown.length(), unknown.source_gid()), (5, Some([0xee; 16])));
    }

    #[test]
    fn inline_data_is_where_it_was_put() {
        let mut wqe = TxWqe::new(SEND, 1, false);
        assert!(
            wqe.push_inline(b"hello ") && wqe.push_inline(b"world") && !wqe.push_inline(&[0; 22])
        );
        assert_eq!(&bytes(&wqe)[32..43], b"hello world");
        assert_eq!(&wqe.inline()[..usize::from(wqe.length)], b"hello world");
        assert_eq!(wqe.buffers().count(), 0);
    }
}
