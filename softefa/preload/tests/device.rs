//! The emulated device's queue pairs, regions and completion queues, at the level of verbs.

mod harness;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::Instant;

use harness::verbs::*;
use harness::*;
use softefa_core::sysfs::gid;

// EFA statuses, as rdma-core's efa_io_defs.h numbers them.
const OK: u32 = 0;
const BAD_LKEY: u32 = 5;
const LOCAL_LENGTH: u32 = 6;
const REMOTE_ADDRESS: u32 = 7;
const BAD_QPN: u32 = 9;
const RNR: u32 = 10;
const REMOTE_LENGTH: u32 = 11;
const UNKNOWN_PEER: u32 = 14;
const UNREACHABLE: u32 = 15;

// --------------------------------------------------------------------------- sends

#[test]
fn sends_arrive_byte_for_byte() {
    let (_turn, a, b) = pair();
    for length in [0, 1, 32, 33, 4096, MTU - 1, MTU] {
        b.receive(5, 1000, length + 7);
        let before = b.region.read(0, 20_000);
        let sent = a.run(&b, Op::Send, 300, length);
        assert_eq!((sent.status, sent.wc_status, sent.opcode), (OK, IBV_WC_SUCCESS, IBV_WC_SEND));
        let received = b.cq.wait();
        assert_eq!(
            received,
            Completion {
                id: 5,
                opcode: IBV_WC_RECV,
                length,
                qp: b.qp.number(),
                source_qp: a.qp.number(),
                slid: b.ah.as_ref().unwrap().number(),
                ..Completion::default()
            }
        );
        let after = b.region.read(0, 20_000);
        assert_eq!(after[1000..1000 + length], a.region.read(300, length));
        assert_eq!(after[..1000], before[..1000], "bytes before the buffer");
        assert_eq!(after[1000 + length..], before[1000 + length..], "bytes after the message");
    }
    let too_long = a.run(&b, Op::Send, 0, MTU + 1);
    assert_eq!((too_long.status, too_long.wc_status), (LOCAL_LENGTH, IBV_WC_LOC_LEN_ERR));
    assert!(b.cq.is_empty());
}

#[test]
fn inline_data_arrives() {
    let (_turn, a, b) = pair();
    for length in [0, 1, 8, 31, 32] {
        let bytes: Vec<u8> = (0..length).map(|k| 200 - k as u8).collect();
        b.receive(1, 0, 64);
        assert_eq!(a.post(&b, 2, Op::Send, Data::Inline(&bytes)), 0);
        assert_eq!((a.cq.wait().status, b.cq.wait().length), (OK, length));
        assert_eq!(b.region.read(0, length), bytes);
    }
    assert_eq!(a.post(&b, 2, Op::Send, Data::Inline(&[0; 33])), libc::EINVAL);
    assert!(a.cq.is_empty());
}

#[test]
fn a_message_may_be_in_two_pieces_on_each_side() {
    let (_turn, a, b) = pair();
    let into = [b.region.sge(100, 10), b.region.sge(5000, 60)];
    b.qp.receive(1, &[&into]).unwrap();
    let from = [a.region.sge(7, 33), a.region.sge(9000, 20)];
    assert_eq!(a.post(&b, 2, Op::Send, Data::Buffers(&from)), 0);
    assert_eq!((a.cq.wait().status, b.cq.wait().length), (OK, 53));
    let sent = [a.region.read(7, 33), a.region.read(9000, 20)].concat();
    let received = [b.region.read(100, 10), b.region.read(5000, 43)].concat();
    assert_eq!(received, sent);
    // Three pieces do not fit into a descriptor, five not into a receive.
    let three = [a.region.sge(0, 1); 3];
    assert_eq!(a.post(&b, 2, Op::Send, Data::Buffers(&three)), libc::EINVAL);
    let five = [b.region.sge(0, 1); 5];
    assert_eq!(b.qp.receive(9, &[&five]), Err((libc::EINVAL, 9)));
}

#[test]
fn immediate_data_arrives_as_it_was_given() {
    let (_turn, a, b) = pair();
    let imm = 0x0102_0304_u32.to_be();
    b.receive(1, 0, 64);
    assert_eq!(a.post(&b, 2, Op::SendImm(imm), Data::Inline(b"x")), 0);
    assert_eq!(b.cq.wait().imm, Some(imm));
    b.receive(1, 0, 64);
    assert_eq!(a.post(&b, 2, Op::Send, Data::Inline(b"x")), 0);
    assert_eq!(b.cq.wait().imm, None);
}

#[test]
fn a_stranger_is_known_by_its_gid() {
    let (_turn, a, mut b) = pair();
    b.ah = None;
    b.receive(1, 0, 64);
    assert_eq!(a.status(&b, Op::Send, 0, 9), OK);
    let received = b.cq.wait();
    assert_eq!((received.slid, received.sgid), (0xffff, Some(a.device.gid())));
    assert_eq!((received.length, received.source_qp), (9, a.qp.number()));
    assert_eq!(b.region.read(0, 9), a.region.read(0, 9));
}

#[test]
fn handles_of_one_nic_share_a_number() {
    let _turn = turn();
    let device = Device::open(0);
    let first = Ah::new(&device, gid(0, 1));
    let other = Ah::new(&device, gid(3, 0));
    let again = Ah::new(&device, gid(0, 1));
    assert_eq!(first.number(), again.number());
    assert_ne!(first.number(), other.number());
    let number = first.number();
    drop(first);
    assert_eq!(Ah::new(&device, gid(0, 1)).number(), number, "its other handle is still there");
}

#[test]
fn a_receive_that_is_too_small_ends_with_an_error() {
    let (_turn, a, b) = pair();
    b.receive(3, 0, 10);
    let before = b.region.read(10, 100);
    assert_eq!(a.status(&b, Op::Send, 0, 11), OK);
    let received = b.cq.wait();
    assert_eq!(
        (received.id, received.status, received.wc_status),
        (3, REMOTE_LENGTH, IBV_WC_REM_INV_REQ_ERR)
    );
    assert_eq!(b.region.read(10, 100), before);
    b.receive(4, 0, 10);
    assert_eq!(a.status(&b, Op::Send, 0, 10), OK);
    assert_eq!((b.cq.wait().status, b.region.read(0, 10)), (OK, a.region.read(0, 10)));
}

#[test]
fn local_keys_are_checked() {
    let (_turn, a, b) = pair();
    b.receive(1, 0, 64);
    let good = a.region.sge(0, 8);
    let size = a.region.bytes.len();
    let read_only = Region::new(&a.device, 64, 0);
    for (op, bad) in [
        (Op::Send, ibv_sge { lkey: good.lkey ^ 1, ..good }),
        (Op::Send, ibv_sge { lkey: 0, ..good }),
        (Op::Send, ibv_sge { addr: good.addr - 1, ..good }),
        (Op::Send, a.region.sge(size - 7, 8)),
        (b.write_at(0), a.region.sge(size - 7, 8)),
        (b.read_at(0), read_only.sge(0, 8)),
    ] {
        assert_eq!(a.post(&b, 1, op, Data::Buffers(&[bad])), 0);
        let completion = a.cq.wait();
        assert_eq!((completion.status, completion.wc_status), (BAD_LKEY, IBV_WC_LOC_PROT_ERR));
    }
    // A region that nobody may write to can be sent from, and not be received into.
    assert_eq!(a.post(&b, 1, Op::Send, Data::Buffers(&[read_only.sge(0, 8)])), 0);
    assert_eq!((a.cq.wait().status, b.cq.wait().status), (OK, OK));
    a.qp.receive(1, &[&[read_only.sge(0, 8)]]).unwrap();
    assert_eq!((b.status(&a, Op::Send, 0, 8), a.cq.wait().status), (OK, BAD_LKEY));
    assert_eq!(read_only.read(0, 8), [0; 8]);
}

// --------------------------------------------------------------------------- RDMA

#[test]
fn writes_and_reads_move_exactly_their_bytes() {
    let (_turn, a, b) = pair();
    let size = b.region.bytes.len();
    for (from, at, length) in [(0, 0, size), (5, 100, 1), (1, 77, 4097), (33, size - 1000, 1000)] {
        let before = b.region.read(0, size);
        let done = a.run(&b, b.write_at(at), from, length);
        assert_eq!((done.status, done.opcode), (OK, IBV_WC_RDMA_WRITE));
        let after = b.region.read(0, size);
        assert_eq!(after[at..at + length], a.region.read(from, length));
        assert_eq!((&after[..at], &after[at + length..]), (&before[..at], &before[at + length..]));
    }
    for (into, at, length) in [(2, 9, 1), (17, 1000, 9001), (1000, size - 1, 1), (0, 0, size)] {
        let before = a.region.read(0, size);
        let done = a.run(&b, b.read_at(at), into, length);
        assert_eq!(
            (done.status, done.opcode),
            (OK, IBV_WC_SEND),
            "rdma-core's efa calls a read a send"
        );
        let after = a.region.read(0, size);
        assert_eq!(after[into..into + length], b.region.read(at, length));
        assert_eq!(
            (&after[..into], &after[into + length..]),
            (&before[..into], &before[into + length..])
        );
    }
    assert!(b.cq.is_empty(), "the target hears nothing of it");
}

#[test]
fn remote_bounds_are_exact() {
    let (_turn, a, b) = pair();
    let size = b.region.bytes.len();
    for at in [b.write_at(size - 9), b.read_at(size - 9), b.write_imm_at(size - 9, 1)] {
        let before = b.region.read(0, size);
        let done = a.run(&b, at, 0, 10);
        assert_eq!((done.status, done.wc_status), (REMOTE_ADDRESS, IBV_WC_REM_ACCESS_ERR));
        assert_eq!(b.region.read(0, size), before);
    }
    let (key, to) = (b.region.key(), b.region.address());
    assert_eq!(a.status(&b, Op::Write { key, to: to - 1 }, 0, 1), REMOTE_ADDRESS);
    assert_eq!(a.status(&b, Op::Write { key, to: u64::MAX }, 0, 2), REMOTE_ADDRESS);
    assert_eq!(a.status(&b, b.write_at(size - 10), 0, 10), OK);
    // Zero bytes are no error, not even at the end; beyond it they are.
    assert_eq!(a.status(&b, b.write_at(size), 0, 0), OK);
    assert_eq!(a.status(&b, b.read_at(0), 0, 0), OK);
    assert_eq!(a.status(&b, b.write_at(size + 1), 0, 0), REMOTE_ADDRESS);
    assert_eq!(a.post(&b, 1, b.write_at(0), Data::Buffers(&[])), 0);
    assert_eq!(a.cq.wait().status, OK, "no buffer at all");
}

#[test]
fn memory_is_registered_by_its_file() {
    let (_turn, a, b) = pair();
    // SAFETY: a descriptor that is ours from here on.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
    file.write_all_at(&[7; 3 * 4096], 0).unwrap();
    let bytes = |from: u64, length: usize| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, from).unwrap();
        bytes
    };
    let mapped = || std::fs::read_to_string("/proc/self/maps").unwrap().contains("memfd:memory");
    // An address at which this process has nothing, as a GPU's.
    let (offset, length, iova) = (5000, 4000, 0x7000_0000_0000);
    let region = FileRegion::new(&b.device, &file, offset, length, iova).unwrap();
    let key = region.key();
    assert_eq!(a.status(&b, Op::Write { key, to: iova + 10 }, 33, 3990), OK);
    assert_eq!(bytes(0, 5010), [7; 5010]);
    assert_eq!(bytes(5010, 3990), a.region.read(33, 3990));
    assert_eq!(bytes(9000, 3288), [7; 3288], "bytes after it");
    assert_eq!(a.status(&b, Op::Read { key, from: iova }, 100, length), OK);
    assert_eq!(a.region.read(100, length), bytes(offset, length));
    for (to, length) in [(iova - 1, 1), (iova + 1, 4000), (iova + 4000, 1)] {
        assert_eq!(a.status(&b, Op::Write { key, to }, 0, length), REMOTE_ADDRESS);
    }
    // It is sent from, and received into.
    let data = [ibv_sge { addr: iova, length: 64, lkey: key }];
    a.receive(1, 0, 64);
    assert_eq!(b.post(&a, 1, Op::Send, Data::Buffers(&data)), 0);
    assert_eq!((b.cq.wait().status, a.cq.wait().status), (OK, OK));
    assert_eq!(a.region.read(0, 64), bytes(offset, 64));
    assert!(mapped());
    drop(region);
    assert!(!mapped(), "nothing is left");
    assert_eq!(a.status(&b, Op::Write { key, to: iova }, 0, 8), REMOTE_ADDRESS);
    let refused = |offset, length| FileRegion::new(&b.device, &file, offset, length, iova).err();
    assert_eq!(refused(0, 3 * 4096 + 1), Some(libc::EINVAL), "past its end");
    assert_eq!(refused(u64::MAX, 4096), Some(libc::EINVAL));
    assert_eq!(refused(0, 0), Some(libc::EINVAL));
    assert!(!mapped());
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let (_turn, a, _b) = pair();
    // SAFETY: a fresh mapping, which nothing can be read from; unmapped below.
    unsafe {
        let none = libc::PROT_NONE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = libc::mmap(ptr::null_mut(), 8192, libc::PROT_READ, kind, -1, 0);
        assert_eq!(libc::mprotect(at.byte_add(4096), 4096, none), 0);
        for (from, length) in [(4096, 1), (0, 4097), (4000, 200)] {
            let mr = (api().ibv_reg_mr)(a.device.pd, at.byte_add(from), length, ALL as i32);
            assert!(mr.is_null());
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
        }
        libc::munmap(at, 8192);
    }
}

#[test]
fn access_is_as_registered() {
    let (_turn, a, b) = pair();
    let check = |access, write, read| {
        let region = Region::new(&b.device, 64, access);
        let (key, at) = (region.key(), region.address());
        assert_eq!(a.status(&b, Op::Read { key, from: at }, 0, 8), read, "read, access {access}");
        assert_eq!(region.read(0, 8), [0; 8]);
        assert_eq!(a.status(&b, Op::Write { key, to: at }, 0, 8), write, "write, access {access}");
        let expected = if write == OK { a.region.read(0, 8) } else { vec![0; 8] };
        assert_eq!(region.read(0, 8), expected);
    };
    check(ALL, OK, OK);
    check(IBV_ACCESS_LOCAL_WRITE, REMOTE_ADDRESS, REMOTE_ADDRESS);
    check(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE, OK, REMOTE_ADDRESS);
    check(IBV_ACCESS_REMOTE_READ, REMOTE_ADDRESS, OK);
}

#[test]
fn keys_are_of_one_nic_and_end_with_their_region() {
    let (_turn, a, b) = pair();
    // More regions on b's NIC than on a's: the keys of the newest name nothing there.
    let others: Vec<Region> = (0..50).map(|_| Region::new(&b.device, 64, ALL)).collect();
    let last = others.last().unwrap();
    let (key, to) = (last.key(), last.address());
    assert_eq!(a.status(&b, Op::Write { key, to }, 0, 8), OK);
    assert_eq!(b.status(&a, Op::Write { key, to }, 0, 8), REMOTE_ADDRESS);
    drop(others);
    assert_eq!(a.status(&b, Op::Write { key, to }, 0, 8), REMOTE_ADDRESS);
    assert_eq!(a.status(&b, Op::Read { key, from: to }, 0, 8), REMOTE_ADDRESS);
}

#[test]
fn a_key_does_not_come_back_with_its_place() {
    let (_turn, a, b) = pair();
    let mut region = Region::new(&b.device, 64, ALL);
    let (key, to) = (region.key(), region.address());
    let bytes = std::mem::take(&mut region.bytes);
    drop(region);
    let again = loop {
        let region = Region::new(&b.device, 64, ALL);
        assert_ne!(region.key(), key);
        if region.key() >> 8 == key >> 8 {
            break region;
        }
    };
    assert_eq!(
        a.status(&b, Op::Write { key, to }, 0, 8),
        REMOTE_ADDRESS,
        "the old key opens nothing"
    );
    let (key, to) = (again.key(), again.address());
    assert_eq!(a.status(&b, Op::Write { key, to }, 0, 8), OK);
    assert_eq!((again.read(0, 8), &*bytes), (a.region.read(0, 8), &[0; 64][..]));
}

#[test]
fn the_longest_rdma_is_the_devices() {
    let (_turn, a, b) = pair();
    // As SOFTEFA_MAX_RDMA has it here.
    let most = 0x20_0000;
    let (mut near, far) =
        (Region::new(&a.device, most + 1, ALL), Region::new(&b.device, most + 1, ALL));
    near.bytes.iter_mut().enumerate().for_each(|(k, byte)| *byte = (k % 253) as u8);
    let op = Op::Write { key: far.key(), to: far.address() };
    for (length, status) in [(most + 1, LOCAL_LENGTH), (most, OK)] {
        assert_eq!(a.post(&b, 1, op, Data::Buffers(&[near.sge(0, length)])), 0);
        assert_eq!(a.cq.wait().status, status);
        assert_eq!(far.read(0, most) == near.read(0, most), status == OK);
    }
    assert_eq!(far.read(most, 1), [0]);
}

#[test]
fn a_write_with_immediate_data_uses_a_receive() {
    let (_turn, a, b) = pair();
    b.receive(8, 20_000, 64);
    let untouched = b.region.read(20_000, 64);
    let imm = 0xa1b2_c3d4_u32.to_be();
    let done = a.run(&b, b.write_imm_at(10, imm), 1000, 5000);
    assert_eq!((done.status, done.opcode), (OK, IBV_WC_RDMA_WRITE));
    let notice = b.cq.wait();
    assert_eq!((notice.id, notice.opcode, notice.imm), (8, IBV_WC_RECV_RDMA_WITH_IMM, Some(imm)));
    assert_eq!((notice.length, notice.source_qp), (5000, a.qp.number()));
    assert!(!notice.is_unsolicited);
    assert_eq!(b.region.read(10, 5000), a.region.read(1000, 5000));
    assert_eq!(b.region.read(20_000, 64), untouched, "the receive's own buffer");
    // It was the only receive.
    a.qp.set_rnr_retry(0);
    assert_eq!(a.status(&b, b.write_imm_at(10, imm), 0, 8), RNR);
}

#[test]
fn a_long_write_with_immediate_data_tells_its_length() {
    let (_turn, a, b) = pair();
    let (near, far) = (Region::new(&a.device, 300_000, ALL), Region::new(&b.device, 300_000, ALL));
    b.receive(8, 0, 0);
    let op = Op::WriteImm { key: far.key(), to: far.address(), imm: 0 };
    assert_eq!(a.post(&b, 1, op, Data::Buffers(&[near.sge(0, 300_000)])), 0);
    assert_eq!((a.cq.wait().status, b.cq.wait().length), (OK, 300_000));
}

#[test]
fn an_unsolicited_write_with_immediate_data_uses_no_receive() {
    let (_turn, a, b) = pair_of(Kind { unsolicited: true, ..Kind::default() });
    a.qp.set_rnr_retry(0);
    // More than one lap of the packets' ring.
    for k in 0..300 {
        assert_eq!(a.status(&b, b.write_imm_at(10, k), 1000, 50), OK);
        let notice = b.cq.wait();
        assert!(notice.is_unsolicited);
        assert_eq!((notice.id, notice.opcode, notice.imm), (0, IBV_WC_RECV_RDMA_WITH_IMM, Some(k)));
        assert_eq!(notice.length, 50);
    }
    assert_eq!(b.region.read(10, 50), a.region.read(1000, 50));
    assert_eq!(a.status(&b, Op::Send, 0, 8), RNR, "a send needs one still");
    b.receive(6, 0, 64);
    assert_eq!(a.status(&b, b.write_imm_at(10, 1), 0, 8), OK);
    assert!(b.cq.wait().is_unsolicited);
    assert_eq!(a.status(&b, Op::Send, 0, 8), OK);
    assert_eq!(b.cq.wait().id, 6, "the receive is there still");
}

#[test]
fn a_target_answers_those_whom_it_knows() {
    let (_turn, a, mut b) = pair();
    let before = b.region.read(0, 64);
    b.ah = None;
    for op in [b.write_at(0), b.read_at(0), b.write_imm_at(0, 1)] {
        let done = a.run(&b, op, 100, 8);
        assert_eq!((done.status, done.wc_status), (UNKNOWN_PEER, IBV_WC_REM_OP_ERR));
    }
    assert_eq!(b.region.read(0, 64), before);
    b.ah = Some(Ah::new(&b.device, a.device.gid()));
    assert_eq!(a.status(&b, b.write_at(0), 100, 8), OK);
}

// --------------------------------------------------------------------------- who is not there

#[test]
fn a_receiver_that_is_not_ready_is_an_error_after_the_retries() {
    let (_turn, a, b) = pair();
    for (retries, least_us) in [(0, 2000), (1, 4000), (3, 8000)] {
        a.qp.set_rnr_retry(retries);
        let begun = Instant::now();
        let done = a.run(&b, Op::Send, 0, 8);
        assert_eq!((done.status, done.wc_status), (RNR, IBV_WC_RNR_RETRY_EXC_ERR));
        assert!(
            begun.elapsed().as_micros() >= least_us,
            "{retries} retries in {:?}",
            begun.elapsed()
        );
    }
    b.receive(1, 0, 8);
    assert_eq!(a.status(&b, Op::Send, 50, 8), OK);
    assert_eq!((b.cq.wait().id, b.region.read(0, 8)), (1, a.region.read(50, 8)));
    assert!(b.cq.is_empty(), "what failed has not arrived");
}

#[test]
fn retries_without_end_need_nobody_who_polls() {
    let (_turn, a, b) = pair();
    a.qp.set_rnr_retry(7);
    for k in 0..20 {
        assert_eq!(a.post(&b, k, Op::Send, Data::Buffers(&[a.region.sge(k as usize, 100)])), 0);
        if k == 0 {
            // Longer than any finite number of retries would take.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        b.receive(k, 0, 100);
        // Nobody polls a's queue meanwhile.
        assert_eq!((b.cq.wait().id, b.region.read(0, 100)), (k, a.region.read(k as usize, 100)));
        assert_eq!((a.cq.wait().status, a.cq.is_empty()), (OK, true));
    }
}

#[test]
fn what_waits_is_overtaken_and_comes_once() {
    let (_turn, a, b) = pair();
    for k in 0..5 {
        assert_eq!(a.post(&b, k, Op::Send, Data::Inline(&[k as u8])), 0);
    }
    // A write needs no receive.
    assert_eq!((a.status(&b, b.write_at(1000), 0, 8), a.cq.is_empty()), (OK, true));
    (0..5).for_each(|k| b.receive(k, k as usize, 1));
    let (mut sent, mut received) = ([0; 5], [0; 5]);
    for k in 0..5 {
        (sent[k], received[k]) = (a.cq.wait().id, b.cq.wait().id);
    }
    assert_eq!(received, [0, 1, 2, 3, 4]);
    sent.sort_unstable();
    let mut bytes = b.region.read(0, 5);
    bytes.sort_unstable();
    assert_eq!((sent, &*bytes), ([0, 1, 2, 3, 4], &[0, 1, 2, 3, 4][..]));
    assert!(a.cq.is_empty() && b.cq.is_empty());
}

#[test]
fn queue_pairs_that_are_not_ready_refuse() {
    let (_turn, a, mut b) = pair();
    b.receive(1, 0, 64);
    let bad = |to: To| {
        for op in [Op::Send, b.write_at(0), b.read_at(0)] {
            assert_eq!(a.qp.post(1, op, Data::Buffers(&[a.region.sge(0, 8)]), to), 0);
            let done = a.cq.wait();
            assert_eq!((done.status, done.wc_status), (BAD_QPN, IBV_WC_REM_INV_RD_REQ_ERR));
        }
    };
    let good = a.to(b.qp.number());
    bad(To { qkey: QKEY + 1, ..good });
    bad(To { qp: 0, ..good });
    bad(To { qp: 9999, ..good });
    b.qp.set_state(IBV_QPS_RESET);
    bad(good);
    b.qp.set_state(IBV_QPS_INIT);
    bad(good);
    b.qp.set_state(IBV_QPS_RTR);
    assert_eq!(a.status(&b, Op::Send, 0, 8), OK);
    assert_eq!(b.cq.wait().status, OK);
    let number = b.qp.number();
    b.qp = QueuePair::ready(&b.cq, Kind::default());
    assert_ne!(b.qp.number(), number, "numbers come back late");
    assert_eq!(a.qp.post(1, Op::Send, Data::Inline(b"x"), good), 0);
    assert_eq!(a.cq.wait().status, BAD_QPN, "destroyed");
}

#[test]
fn a_nic_that_never_was_is_unreachable_after_a_while() {
    let (_turn, a, _b) = pair();
    let nobody = Ah::new(&a.device, gid(77, 0));
    let to = To { ah: nobody.ah, qp: 1, qkey: QKEY };
    let begun = Instant::now();
    assert_eq!(a.qp.post(1, Op::Send, Data::Inline(b"x"), to), 0);
    let done = a.cq.wait();
    assert_eq!((done.status, done.wc_status), (UNREACHABLE, IBV_WC_RESP_TIMEOUT_ERR));
    assert!(begun.elapsed() >= DEAD, "{:?}", begun.elapsed());
}

#[test]
fn datagrams_may_be_lost_and_have_a_header() {
    let (_turn, a, b) = pair_of(Kind { is_ud: true, ..Kind::default() });
    assert_eq!(a.status(&b, Op::Send, 0, 8), OK, "no receive: lost without a word");
    let wrong = To { qkey: QKEY + 1, ..a.to(b.qp.number()) };
    assert_eq!(a.qp.post(1, Op::Send, Data::Inline(b"x"), wrong), 0);
    assert_eq!((a.cq.wait().status, b.cq.is_empty()), (OK, true));
    b.receive(4, 100, 60);
    assert_eq!(a.status(&b, Op::Send, 7, 20), OK);
    let received = b.cq.wait();
    assert_eq!((received.id, received.status, received.length), (4, OK, 60));
    assert_eq!(b.region.read(140, 20), a.region.read(7, 20));
    b.receive(5, 100, 60);
    assert_eq!((a.status(&b, Op::Send, 7, 21), b.cq.wait().status), (OK, REMOTE_LENGTH));
}

// --------------------------------------------------------------------------- queues

#[test]
fn a_full_send_queue_undoes_the_batch() {
    let (_turn, a, b) = pair_of(Kind { send_wr: 4, ..Kind::default() });
    for k in 0..8 {
        b.receive(k, k as usize, 1);
    }
    let to = a.to(b.qp.number());
    let batch = |bytes: &[u8]| {
        a.qp.start();
        bytes
            .iter()
            .for_each(|byte| a.qp.add((*byte).into(), true, Op::Send, Data::Inline(&[*byte]), to));
        a.qp.complete()
    };
    assert_eq!(batch(&[1, 2, 3]), 0);
    assert_eq!(batch(&[4, 5]), libc::ENOMEM);
    assert_eq!(batch(&[6]), 0);
    assert_eq!(batch(&[7]), libc::ENOMEM);
    let ids = [(); 4].map(|()| a.cq.wait().id);
    assert_eq!((ids, a.cq.is_empty()), ([1, 2, 3, 6], true));
    assert_eq!(batch(&[8, 9, 10, 11, 12]), libc::ENOMEM, "more than the queue ever holds");
    assert_eq!(batch(&[13, 14, 15, 16]), 0);
    (0..8).for_each(|k| assert_eq!(b.cq.wait().id, k));
    assert_eq!(b.region.read(0, 8), [1, 2, 3, 6, 13, 14, 15, 16]);
    assert_eq!(nic_stat(0, 0).queue_pairs[0].counters["refused"], 3);
}

#[test]
fn an_aborted_batch_was_never() {
    let (_turn, a, b) = pair_of(Kind { send_wr: 4, ..Kind::default() });
    let to = a.to(b.qp.number());
    for _ in 0..10 {
        a.qp.start();
        (0..4).for_each(|k| {
            a.qp.add(k, true, b.write_at(0), Data::Buffers(&[a.region.sge(100, 8)]), to)
        });
        a.qp.abort();
    }
    assert!(a.cq.is_empty());
    assert_eq!(b.region.read(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    a.qp.start();
    (0..4)
        .for_each(|k| a.qp.add(k, true, b.write_at(0), Data::Buffers(&[a.region.sge(100, 8)]), to));
    assert_eq!(a.qp.complete(), 0);
    (0..4).for_each(|k| assert_eq!(a.cq.wait().id, k));
    assert_eq!(b.region.read(0, 8), a.region.read(100, 8));
}

#[test]
fn what_is_not_signalled_frees_its_room_unless_it_fails() {
    let (_turn, a, b) = pair_of(Kind { send_wr: 4, ..Kind::default() });
    let to = a.to(b.qp.number());
    let post = |id, op, sge| {
        a.qp.start();
        a.qp.add(id, false, op, Data::Buffers(&[sge]), to);
        a.qp.complete()
    };
    for k in 0..40 {
        assert_eq!(post(k, b.write_at(k as usize), a.region.sge(90, 1)), 0, "write {k}");
    }
    assert!(a.cq.is_empty());
    assert_eq!(b.region.read(0, 40), [90; 40]);
    assert_eq!(post(9, b.write_at(64 << 10), a.region.sge(0, 1)), 0);
    let done = a.cq.wait();
    assert_eq!((done.id, done.status), (9, REMOTE_ADDRESS), "an error is always told");
}

#[test]
fn a_full_receive_queue_names_the_first_that_it_refused() {
    let (_turn, a, b) = pair_of(Kind { recv_wr: 4, ..Kind::default() });
    let one: &[ibv_sge] = &[b.region.sge(0, 8)];
    assert_eq!(b.qp.receive(0, &[one; 6]), Err((libc::ENOMEM, 4)));
    assert_eq!(a.status(&b, Op::Send, 0, 8), OK);
    assert_eq!(b.cq.wait().id, 0);
    assert_eq!(b.qp.receive(10, &[one; 2]), Err((libc::ENOMEM, 11)));
    for id in [1, 2, 3, 10] {
        assert_eq!(a.status(&b, Op::Send, 0, 8), OK);
        assert_eq!(b.cq.wait().id, id);
    }
}

#[test]
fn ids_have_64_bits() {
    let (_turn, a, b) = pair();
    let id = 0xfedc_ba98_7654_3210;
    b.receive(!id, 0, 8);
    assert_eq!(a.post(&b, id, Op::Send, Data::Inline(b"x")), 0);
    assert_eq!((a.cq.wait().id, b.cq.wait().id), (id, !id));
}

/// Two completions more than the queue holds.
fn overrun() {
    let (_turn, a, b) = pair();
    let cq = Cq::new(&a.device, 4);
    let qp = QueuePair::ready(&cq, Kind::default());
    for id in 0..6 {
        assert_eq!(
            qp.post(id, b.write_at(0), Data::Buffers(&[a.region.sge(0, 1)]), a.to(b.qp.number())),
            0
        );
    }
    (0..4).for_each(|id| assert_eq!(cq.wait().id, id));
    assert!(cq.is_empty());
    assert_eq!(nic_stat(0, 0).counters["overruns"], 2);
}

#[test]
fn an_overrun_is_counted_and_told() {
    let name = "an_overrun_is_counted_and_told";
    if is_child(name) {
        return overrun();
    }
    let (output, _dir) = run_alone(name, &[], "");
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    assert_eq!(told.matches("COMPLETION QUEUE OVERRUN").count(), 1, "{told}");
    let (output, _dir) = run_alone(name, &[("SOFTEFA_ABORT_ON_OVERRUN", "1")], "");
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    assert_eq!(signal, Some(libc::SIGABRT));
    assert!(String::from_utf8(output.stderr).unwrap().contains("COMPLETION QUEUE OVERRUN"));
}

#[test]
fn a_destroyed_queue_pairs_completions_are_nobodys() {
    let (_turn, mut a, b) = pair();
    let write = |qp: &QueuePair, id| {
        assert_eq!(
            qp.post(id, b.write_at(0), Data::Buffers(&[a.region.sge(0, 1)]), a.to(b.qp.number())),
            0
        );
    };
    let other = QueuePair::ready(&a.cq, Kind::default());
    write(&a.qp, 1);
    write(&other, 2);
    write(&a.qp, 3);
    write(&other, 4);
    let number = other.number();
    drop(other);
    // Another has its number, in the end.
    let next = loop {
        let qp = QueuePair::ready(&a.cq, Kind::default());
        if qp.number() == number {
            break qp;
        }
    };
    write(&next, 5);
    let mut ids = Vec::new();
    loop {
        match a.cq.poll() {
            Ok(completion) => ids.push(completion.id),
            Err(libc::EINVAL) => {}
            Err(error) => break assert_eq!(error, libc::ENOENT),
        }
    }
    assert_eq!(ids, [1, 3, 5]);
    a.qp = next;
    assert_eq!(a.status(&b, b.write_at(0), 0, 8), OK);
}

#[test]
fn a_queue_with_queue_pairs_is_not_destroyed() {
    let (_turn, a, _b) = pair();
    // SAFETY: it is refused; were it not, the drop would fail.
    assert_eq!(unsafe { (api().ibv_destroy_cq)(a.cq.cq.cast()) }, libc::EBUSY);
}

#[test]
fn the_old_functions_do_the_same() {
    let (_turn, a, b) = pair();
    b.receive(1, 0, 8);
    b.receive(2, 8, 100);
    let to = a.to(b.qp.number());
    let pieces = [a.region.sge(50, 10), a.region.sge(90, 10)];
    let bytes = *b"12345678";
    let inline = ibv_sge { addr: bytes.as_ptr() as u64, length: 8, lkey: 0 };
    // SAFETY: structs of numbers and pointers; lists that live through the calls.
    unsafe {
        let mut first: ibv_send_wr = std::mem::zeroed();
        (first.wr_id, first.opcode, first.num_sge) = (11, IBV_WR_SEND, 1);
        first.send_flags = IBV_SEND_SIGNALED | IBV_SEND_INLINE;
        first.sg_list = ptr::from_ref(&inline).cast_mut();
        first.wr.ud.ah = to.ah;
        first.wr.ud.remote_qpn = to.qp;
        first.wr.ud.remote_qkey = to.qkey;
        let mut second = first;
        (second.wr_id, second.opcode, second.num_sge) = (12, IBV_WR_SEND_WITH_IMM, 2);
        second.send_flags = IBV_SEND_SIGNALED;
        second.sg_list = pieces.as_ptr().cast_mut();
        second.__bindgen_anon_1.imm_data = 0x0bad_cafe;
        first.next = &mut second;
        let mut bad = ptr::null_mut();
        assert_eq!(a.device.ops().post_send.unwrap()(a.qp.qp.cast(), &mut first, &mut bad), 0);

        let mut wcs: [ibv_wc; 4] = std::mem::zeroed();
        let poll = a.device.ops().poll_cq.unwrap();
        let poll_both = |cq: &Cq, wcs: &mut [ibv_wc; 4]| {
            let begun = Instant::now();
            let mut n = 0;
            while n < 2 {
                n += poll(cq.cq.cast(), 4 - n as i32, wcs[n..].as_mut_ptr()) as usize;
                assert!(begun.elapsed() < PATIENCE);
            }
            assert_eq!(poll(cq.cq.cast(), 2, wcs[2..].as_mut_ptr()), 0);
        };
        poll_both(&a.cq, &mut wcs);
        assert_eq!(
            wcs[..2].iter().map(|wc| (wc.wr_id, wc.status, wc.opcode)).collect::<Vec<_>>(),
            [(11, IBV_WC_SUCCESS, IBV_WC_SEND), (12, IBV_WC_SUCCESS, IBV_WC_SEND)]
        );
        poll_both(&b.cq, &mut wcs);
        let [first, second, ..] = &wcs;
        assert_eq!(
            (first.wr_id, first.opcode, first.byte_len, first.wc_flags),
            (1, IBV_WC_RECV, 8, 0)
        );
        assert_eq!((second.wr_id, second.byte_len, second.wc_flags), (2, 20, IBV_WC_WITH_IMM));
        assert_eq!(second.__bindgen_anon_1.imm_data, 0x0bad_cafe);
        assert_eq!((second.qp_num, second.src_qp), (b.qp.number(), a.qp.number()));
        assert_eq!(u32::from(second.slid), b.ah.as_ref().unwrap().number());
    }
    let received = [a.region.read(50, 10), a.region.read(90, 10)].concat();
    assert_eq!((b.region.read(0, 8), b.region.read(8, 20)), (bytes.to_vec(), received));
}

// --------------------------------------------------------------------------- events

#[test]
fn an_event_comes_once_for_each_time_it_was_asked_for() {
    let (_turn, a, b) = pair();
    let mut mark = 0u8;
    // SAFETY: an opened device; the channel is destroyed after its queue.
    let channel = unsafe { (api().ibv_create_comp_channel)(b.device.context) };
    // SAFETY: a channel.
    let fd = unsafe { (*channel).fd };
    let cq = Cq::with_channel(&b.device, 64, channel, (&raw mut mark).cast());
    let qp = QueuePair::ready(&cq, Kind::default());
    let one_event = || {
        assert!(readable(fd, PATIENCE), "no event");
        let (mut which, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a channel, and room for the results.
        assert_eq!(unsafe { (api().ibv_get_cq_event)(channel, &mut which, &mut context) }, 0);
        assert_eq!((which, context), (cq.cq.cast(), (&raw const mark).cast_mut().cast()));
        // SAFETY: a queue.
        unsafe { (api().ibv_ack_cq_events)(which, 1) };
        assert!(!readable(fd, std::time::Duration::from_millis(20)), "a second event");
    };
    let no_event =
        || assert!(!readable(fd, std::time::Duration::from_millis(20)), "an event unasked");
    let receive = |n: u64| (0..n).for_each(|k| qp.receive(k, &[&[b.region.sge(0, 8)]]).unwrap());
    let send = || {
        assert_eq!(a.qp.post(1, Op::Send, Data::Inline(b"x"), a.to(qp.number())), 0);
        assert_eq!(a.cq.wait().status, OK);
    };
    let write = || {
        let op = a.write_at(0);
        assert_eq!(qp.post(2, op, Data::Buffers(&[b.region.sge(0, 8)]), b.to(a.qp.number())), 0);
    };
    receive(8);
    // Unasked.
    send();
    assert_eq!(cq.wait().opcode, IBV_WC_RECV);
    no_event();
    // For what comes later, a receive and then a send of its own.
    cq.arm();
    no_event();
    send();
    one_event();
    send();
    no_event();
    (0..2).for_each(|_| assert_eq!(cq.wait().opcode, IBV_WC_RECV));
    cq.arm();
    write();
    one_event();
    assert_eq!(cq.wait().opcode, IBV_WC_RDMA_WRITE);
    // For what was there before.
    send();
    cq.arm();
    one_event();
    assert_eq!(cq.wait().opcode, IBV_WC_RECV);
    write();
    cq.arm();
    one_event();
    assert_eq!((cq.wait().opcode, cq.is_empty()), (IBV_WC_RDMA_WRITE, true));
    // SAFETY: nothing; the queue holds it.
    assert_eq!(unsafe { (api().ibv_destroy_comp_channel)(channel) }, libc::EBUSY);
    drop(qp);
    drop(cq);
    // SAFETY: its queue is gone.
    assert_eq!(unsafe { (api().ibv_destroy_comp_channel)(channel) }, 0);
}

// --------------------------------------------------------------------------- other settings

#[test]
fn the_page_table_has_an_end() {
    if !alone("the_page_table_has_an_end", &[("SOFTEFA_PAGES", "100")]) {
        return;
    }
    let _turn = turn();
    let (device, other) = (Device::open(0), Device::open(1));
    let first = Region::new(&device, 60 * 4096, ALL);
    assert!(Region::try_new(&device, 60 * 4096, ALL).is_none());
    let small = Region::new(&device, 30 * 4096, ALL);
    assert!(Region::try_new(&device, 60 * 4096, ALL).is_none());
    assert!(Region::try_new(&other, 60 * 4096, ALL).is_some(), "each NIC has its own");
    drop(first);
    let again = Region::try_new(&device, 60 * 4096, ALL);
    assert!(again.is_some());
    drop((small, again));
    assert_eq!((nic_stat(0, 0).pages, nic_stat(0, 0).regions), (0, 0));
}

#[test]
fn queues_are_not_mapped_on_the_verbs_path() {
    let (_turn, a, _b) = pair();
    // SAFETY: zeroes are values of these structs; an opened device's queues.
    unsafe {
        let (mut sq, mut rq): (WqAttr, WqAttr) = (std::mem::zeroed(), std::mem::zeroed());
        let mut cq: CqAttr = std::mem::zeroed();
        let size = size_of::<WqAttr>() as u32;
        let error = (api().efadv_query_qp_wqs)(a.qp.qp.cast(), &mut sq, &mut rq, size);
        assert_eq!(error, libc::EOPNOTSUPP);
        let error = (api().efadv_query_cq)(a.cq.cq.cast(), &mut cq, size_of::<CqAttr>() as u32);
        assert_eq!(error, libc::EOPNOTSUPP);
    }
}
