//! Senders that are killed at any instruction leave the receiver's ring usable: real processes,
//! real shared memory, SIGKILL.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use softefa::cluster::Cluster;
use softefa::shared::{Claim, Front, MTU, SLOTS};

const DIR: &str = "SOFTEFA_SOAK_DIR";
const KILLS: usize = 60;
const SENDERS: usize = 3;
/// Packets between two kills.
const PACKETS: usize = 200;

/// The other processes: they send until they are killed.
#[test]
#[ignore = "run by the soak test as a process of its own"]
fn sender() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let cluster = Cluster::open(Path::new(&dir)).unwrap();
    let me = cluster.join().unwrap();
    let nic = cluster.nic(0, 0, false).unwrap();
    let ring = nic.qps[1].ring();
    let parent = std::os::unix::process::parent_id();
    for k in 0u32.. {
        let at = loop {
            match ring.claim(me, k % 5 == 0) {
                Claim::Slot(at) => break at,
                _ => std::thread::yield_now(),
            }
            if std::os::unix::process::parent_id() != parent {
                return;
            }
        };
        let packet = &nic.packets[1][at as usize % SLOTS];
        let length = k as usize * 37 % MTU;
        packet.length.store(length as u32, Ordering::Relaxed);
        packet.imm.store(k, Ordering::Relaxed);
        packet.has_imm.store(u8::from(k % 5 == 0), Ordering::Relaxed);
        // SAFETY: the claim gave us the slot.
        unsafe { (&mut (*packet.data.get()))[..length].fill(k as u8) };
        ring.publish(at);
    }
}

fn spawn(dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["sender", "--exact", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn senders_may_be_killed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let cluster = Cluster::open(dir.path()).unwrap();
    let me = cluster.join().unwrap();
    let nic = cluster.nic(0, 0, true).unwrap();
    assert_eq!(nic.take_qp(me), Some(1));
    let ring = nic.qps[1].ring();
    // Few receives, so that senders meet "not ready" as well as "full".
    let receives = SLOTS as u64 / 4;
    ring.post(receives);
    let mut senders: Vec<Child> = (0..SENDERS).map(|_| spawn(dir.path())).collect();
    let (mut taken, mut abandoned) = (0u64, 0u64);
    for kill in 0..KILLS {
        let patience = Instant::now() + Duration::from_secs(60);
        for _ in 0..PACKETS {
            loop {
                assert!(
                    Instant::now() < patience,
                    "no packet after kill {kill}: the ring is stuck"
                );
                match ring.front() {
                    Front::Packet(at) => {
                        let packet = &nic.packets[1][at as usize % SLOTS];
                        let length = packet.length.load(Ordering::Relaxed) as usize;
                        let k = packet.imm.load(Ordering::Relaxed);
                        assert_eq!(length, k as usize * 37 % MTU);
                        // SAFETY: published, and ours until it is released.
                        let whole = unsafe {
                            (&(*packet.data.get()))[..length].iter().all(|byte| *byte == k as u8)
                        };
                        assert!(whole, "packet {k} is torn");
                        ring.release(at);
                        // A new receive for the one that was used, or for the one that was not.
                        ring.post(1);
                        taken += 1;
                        break;
                    }
                    Front::Unfinished(at, owner) if !cluster.is_alive(owner) => {
                        ring.abandon(at);
                        abandoned += 1;
                    }
                    _ => std::thread::yield_now(),
                }
            }
        }
        let victim = kill % SENDERS;
        senders[victim].kill().unwrap();
        senders[victim].wait().unwrap();
        senders[victim] = spawn(dir.path());
    }
    for mut sender in senders {
        sender.kill().unwrap();
        sender.wait().unwrap();
    }
    // What was under way is finished or abandoned; then every receive is there again.
    loop {
        match ring.front() {
            Front::Packet(at) => {
                ring.release(at);
                ring.post(1);
            }
            Front::Unfinished(at, owner) => {
                assert!(!cluster.is_alive(owner));
                ring.abandon(at);
            }
            Front::Empty => break,
        }
    }
    println!("{taken} packets, {KILLS} kills, {abandoned} claims of the dead");
    assert_eq!(ring.ready(), receives, "a receive was lost or doubled");
    for _ in 0..receives {
        let Claim::Slot(at) = ring.claim(me, false) else { panic!("not every receive is usable") };
        ring.publish(at);
    }
    assert_eq!(ring.claim(me, false), Claim::NotReady);
}
