//! One helper thread a process: does what a NIC does while the application looks elsewhere. It tries
//! again what waits, writes completions that are due, delivers events, and on the direct data path, where
//! no function of ours is called, watches the doorbells.

use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use softefa_core::cluster::now;

use crate::cq::Cq;
use crate::device::Context;
use crate::faults;
use crate::world::World;

struct Registry {
    cqs: Vec<*const Cq>,
    contexts: Vec<*const Context>,
}
// SAFETY: what is destroyed leaves the registry first, under its lock.
unsafe impl Send for Registry {}

static REGISTRY: AtomicPtr<Mutex<Registry>> = AtomicPtr::new(std::ptr::null_mut());
static RUNNING: AtomicBool = AtomicBool::new(false);
/// Somebody has called since the last round began.
static CALLED: AtomicBool = AtomicBool::new(false);

/// This process's own; never freed.
fn registry() -> &'static Mutex<Registry> {
    let mut at = REGISTRY.load(Ordering::Acquire);
    if at.is_null() {
        let new =
            Box::into_raw(Box::new(Mutex::new(Registry { cqs: Vec::new(), contexts: Vec::new() })));
        at = match REGISTRY.compare_exchange(
            std::ptr::null_mut(),
            new,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => new,
            Err(other) => {
                // SAFETY: made above, and seen by nobody.
                drop(unsafe { Box::from_raw(new) });
                other
            }
        };
    }
    // SAFETY: never freed.
    unsafe { &*at }
}

pub fn add_cq(cq: &Cq) {
    registry().lock().cqs.push(cq);
}
pub fn remove_cq(cq: &Cq) {
    registry().lock().cqs.retain(|&other| !std::ptr::eq(other, cq));
}
pub fn add_context(context: &Context) {
    registry().lock().contexts.push(context);
    start(context.world);
}
pub fn remove_context(context: &Context) {
    registry().lock().contexts.retain(|&other| !std::ptr::eq(other, context));
}

/// In a child after fork the thread is not there any more, what is registered is the parent's, and the
/// lock may be held by nobody who is there: all is left where it is.
pub fn forget() {
    REGISTRY.store(std::ptr::null_mut(), Ordering::SeqCst);
    RUNNING.store(false, Ordering::SeqCst);
    CALLED.store(false, Ordering::SeqCst);
}

/// Something is there to be done.
pub fn call(world: &'static World) {
    if !CALLED.swap(true, Ordering::SeqCst) {
        start(world);
        world.cluster.wake(world.me());
    }
}

fn start(world: &'static World) {
    if RUNNING.swap(true, Ordering::SeqCst) {
        return;
    }
    // The application's signal handlers must not run in a thread that it does not know.
    // SAFETY: the sets are ours.
    let before = unsafe {
        let mut all = std::mem::zeroed();
        let mut before = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        before
    };
    let made = std::thread::Builder::new().name("softefa".into()).spawn(move || run(world));
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    if let Err(error) = made {
        eprintln!("softefa: no helper thread: {error}");
        RUNNING.store(false, Ordering::SeqCst);
    }
}

/// What a round found.
#[derive(Default)]
struct Round {
    /// Doorbells are to be watched; and there was something.
    direct: bool,
    busy: bool,
    waiting: bool,
    armed: bool,
    due: Option<u64>,
}

fn run(world: &'static World) {
    // SAFETY: a number for this thread: sleep as long as was said, not 50 us longer.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000, 0, 0, 0) };
    let mut idle_since = now();
    loop {
        let seen = world.cluster.wakes(world.me());
        CALLED.store(false, Ordering::SeqCst);
        let round = round(world);
        let time = now();
        if round.busy {
            idle_since = time;
            continue;
        }
        let mut sleep: u64 = 1_000_000_000;
        if round.armed {
            // A wake-up comes with the packet; this is for a sender that died before it.
            sleep = 50_000_000;
        }
        if round.waiting {
            sleep = 100_000;
        }
        if let Some(due) = round.due {
            sleep = sleep.min(due.saturating_sub(time));
        }
        if round.direct {
            match time - idle_since {
                0..5_000 => {
                    std::hint::spin_loop();
                    continue;
                }
                // A thread that sleeps is let in when it wakes; one that spins waits for the end of
                // the application's time slice, if processors are few.
                5_000..1_000_000 => sleep = sleep.min(5_000),
                1_000_000..100_000_000 => sleep = sleep.min(50_000),
                _ => sleep = sleep.min(500_000),
            }
        }
        if sleep < 60_000 {
            // Too short for the system's timers.
            std::thread::sleep(Duration::from_nanos(sleep));
        } else {
            world.cluster.sleep(world.me(), seen, sleep);
        }
    }
}

fn round(world: &'static World) -> Round {
    let mut round = Round::default();
    let registry = registry().lock();
    for &cq in &registry.cqs {
        // SAFETY: registered, under the lock.
        let cq = unsafe { &*cq };
        serve(cq, &mut round);
    }
    let view = faults::current(world);
    let time = now();
    for &context in &registry.contexts {
        // SAFETY: registered, under the lock.
        let context = unsafe { &*context };
        let down =
            view.as_ref().is_some_and(|view| view.nic(world.host, context.device.index, time).down);
        context.set_port(down);
    }
    if let Some(change) = view.and_then(|view| view.script.next_change(time)) {
        round.due = Some(round.due.map_or(change, |due| due.min(change)));
    }
    round
}

fn serve(cq: &Cq, round: &mut Round) {
    cq.arm_by_doorbell();
    let armed = cq.armed.load(Ordering::Acquire);
    round.armed |= armed;
    if let Some(qps) = cq.qps.try_lock() {
        for &qp in qps.iter() {
            // SAFETY: a queue pair leaves this list before it is freed.
            let qp = unsafe { &*qp };
            let direct = qp.is_direct();
            if direct && std::ptr::eq(qp.send_cq(), cq) {
                round.direct = true;
                round.busy |= qp.take_mapped();
            }
            if qp.is_waiting() && std::ptr::eq(qp.send_cq(), cq) {
                qp.retry();
                round.waiting |= qp.is_waiting();
            }
            if (direct || armed) && std::ptr::eq(qp.recv_cq(), cq) {
                if direct {
                    qp.count_mapped();
                }
                round.busy |= qp.receive(64);
                // Not to be received yet, for its delay or because somebody is at it.
                round.waiting |= qp.has_arrived();
            }
        }
    } else {
        // The application is at it, and does the same.
        round.waiting = true;
    }
    if let Some(due) = cq.write_due() {
        round.due = Some(round.due.map_or(due, |other| other.min(due)));
    }
}
