//! An opened NIC: memory regions and address handles.

use std::collections::HashMap;
use std::ffi::c_int;
use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use softefa_core::cluster::coarse_now;
use softefa_core::shared::{NicShared, Owner, QPS};
use softefa_core::sysfs::gid;

use crate::qp::Qp;
use crate::verbs::{ibv_ah, ibv_context, ibv_device, verbs_context};
use crate::wire::NO_AH;
use crate::world::World;

/// Address handles of an opened device.
pub const AHS: usize = 4096;
/// How long a process that lived is believed to live on, in ns.
const TRUST: u64 = 4_000_000;

/// A device of the list. Lives as long as the process.
#[repr(C)]
pub struct Device {
    pub device: ibv_device,
    pub index: u16,
    pub gid: [u8; 16],
}

/// An opened device. Applications hold a pointer to `verbs.context`.
#[repr(C)]
pub struct Context {
    pub verbs: verbs_context,
    pub world: &'static World,
    pub device: &'static Device,
    pub nic: &'static NicShared,
    pub qps: [AtomicPtr<Qp>; QPS],
    peers: Box<[AtomicPtr<Peer>]>,
    numbers: RwLock<HashMap<(u16, u16), u16>>,
    /// Peers without a handle; somebody may still be looking at them.
    gone: Mutex<Vec<*mut Peer>>,
    /// The other end of `verbs.context.async_fd`, and whether the port was last said to be down.
    pub events: c_int,
    pub was_down: Mutex<bool>,
}

// SAFETY: what its pointers point to is shared between threads already.
unsafe impl Send for Context {}
// SAFETY: as above; the rest is atomics and locks.
unsafe impl Sync for Context {}

/// Somebody at the other end of the network: what an address handle stands for.
pub struct Peer {
    pub host: u16,
    pub nic: u16,
    shared: AtomicPtr<NicShared>,
    handles: AtomicU32,
    entry: Option<usize>,
    /// Where in the peer's table we are, as last seen.
    pub known: AtomicU32,
    alive: AtomicU64,
}

/// An address handle.
#[repr(C)]
pub struct Ah {
    pub ah: ibv_ah,
    pub number: u16,
}

/// Host and NIC of a GID, if it is one of ours.
pub fn place_of(raw: [u8; 16]) -> Option<(u16, u16)> {
    let host = u16::from_be_bytes([raw[12], raw[13]]);
    let nic = u16::from_be_bytes([raw[14], raw[15]]).checked_sub(1)?;
    (gid(host, nic) == raw).then_some((host, nic))
}

impl Context {
    /// # Safety
    /// `context` is one that [`crate::abi`] gave out, and it is not closed.
    pub unsafe fn of<'a>(context: *mut ibv_context) -> &'a Context {
        let offset = offset_of!(Context, verbs) + offset_of!(verbs_context, context);
        // SAFETY: the application's pointer is to this field.
        unsafe { &*context.byte_sub(offset).cast::<Context>() }
    }

    pub fn new(
        verbs: verbs_context,
        world: &'static World,
        device: &'static Device,
        nic: &'static NicShared,
        events: c_int,
    ) -> Box<Context> {
        Box::new(Context {
            verbs,
            world,
            device,
            nic,
            qps: [const { AtomicPtr::new(ptr::null_mut()) }; QPS],
            peers: (0..AHS).map(|_| AtomicPtr::default()).collect(),
            numbers: RwLock::default(),
            gone: Mutex::default(),
            events,
            was_down: Mutex::new(false),
        })
    }

    /// As `ibv_devices` shows it.
    pub fn name(&self) -> &str {
        &self.world.profile.nics[usize::from(self.device.index)].name
    }

    /// The address handle number of that NIC, the same for every handle of it.
    /// None: the device has no more.
    pub fn add_peer(&self, host: u16, nic: u16) -> Option<u16> {
        let mut numbers = self.numbers.write();
        if let Some(&number) = numbers.get(&(host, nic)) {
            self.peer(number)?.handles.fetch_add(1, Ordering::Relaxed);
            return Some(number);
        }
        let number = self.peers.iter().position(|peer| peer.load(Ordering::Relaxed).is_null())?;
        let peer = Box::new(Peer {
            host,
            nic,
            shared: AtomicPtr::default(),
            handles: AtomicU32::new(1),
            entry: self.nic.add_ah(self.world.me(), host, nic),
            known: AtomicU32::new(0),
            alive: AtomicU64::new(0),
        });
        self.peers[number].store(Box::into_raw(peer), Ordering::Release);
        numbers.insert((host, nic), number as u16);
        Some(number as u16)
    }

    /// One handle of that number is gone. The peer itself stays in memory until the device is
    /// closed: work requests may be looking at it.
    pub fn remove_peer(&self, number: u16) {
        let mut numbers = self.numbers.write();
        let Some(peer) = self.peer(number) else { return };
        if peer.handles.fetch_sub(1, Ordering::Relaxed) == 1 {
            if let Some(entry) = peer.entry {
                self.nic.remove_ah(entry);
            }
            numbers.remove(&(peer.host, peer.nic));
            let gone = self.peers[usize::from(number)].swap(ptr::null_mut(), Ordering::AcqRel);
            self.gone.lock().push(gone);
        }
    }

    /// The peer of an address handle number.
    pub fn peer(&self, number: u16) -> Option<&Peer> {
        let peer = self.peers.get(usize::from(number))?.load(Ordering::Acquire);
        // SAFETY: peers are freed after the device is closed only.
        unsafe { peer.as_ref() }
    }

    /// The address handle number of a NIC, NO_AH if it has none here.
    pub fn number_of(&self, host: u16, nic: u16) -> u16 {
        self.numbers.read().get(&(host, nic)).copied().unwrap_or(NO_AH)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let peers = self.peers.iter().map(|peer| peer.load(Ordering::Acquire));
        for peer in peers.chain(self.gone.get_mut().drain(..)).filter(|peer| !peer.is_null()) {
            // SAFETY: made by Box::into_raw, and nobody uses a closed device.
            drop(unsafe { Box::from_raw(peer) });
        }
    }
}

impl Peer {
    /// Its NIC, if there is one by now.
    pub fn shared(&self, world: &World) -> Option<&'static NicShared> {
        let shared = self.shared.load(Ordering::Acquire);
        // SAFETY: mapped for good.
        if let Some(shared) = unsafe { shared.as_ref() } {
            return Some(shared);
        }
        let shared = world.cluster.nic(self.host, self.nic, false).ok()?;
        self.shared.store(ptr::from_ref(shared).cast_mut(), Ordering::Release);
        Some(shared)
    }

    /// Does that process live? That there is one of its id is asked each time, which is one quick system
    /// call; that it is not a zombie or another one by now, every few milliseconds only.
    pub fn is_alive(&self, world: &World, owner: Owner) -> bool {
        if owner == world.me() {
            return true;
        }
        let Some(pid) = world.cluster.pid(owner) else { return false };
        // SAFETY: a question, not a signal.
        let gone = unsafe { libc::kill(pid as i32, 0) } != 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        if gone {
            return false;
        }
        // Low bits of the owner beside the time: another owner is asked for anew.
        let stamp = (coarse_now() / TRUST) << 16 | u64::from(owner & 0xffff);
        if self.alive.load(Ordering::Relaxed) == stamp {
            return true;
        }
        let alive = world.cluster.is_alive(owner);
        if alive {
            self.alive.store(stamp, Ordering::Relaxed);
        }
        alive
    }
}
