//! The functions of libibverbs and libefa that libfabric's efa provider calls. Preloaded, they come before
//! the real ones.
//!
//! None of them panics by itself; Rust ends the process if one did, and no panic crosses into C.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::io;
use std::mem;
use std::ptr;
use std::slice;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};

use softefa_core::cluster;
use softefa_core::shared::{QPS, QpState};
use softefa_core::sysfs::gid;

use crate::cq::{Channel, Cq, DvCq, wc_opcode, wc_status};
use crate::device::{AHS, Ah, Context, Device, place_of};
use crate::qp::{Qp, Sender, Wanted};
use crate::verbs::*;
use crate::wire::{self, Buffer, INLINE, TxWqe};
use crate::{agent, pages, world};

fn set_errno(error: c_int) {
    // SAFETY: errno is this thread's.
    unsafe { *libc::__errno_location() = error };
}

fn null<T>(error: c_int) -> *mut T {
    set_errno(error);
    ptr::null_mut()
}

// ------------------------------------------------------------------------- devices

fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    let Some(world) = world::world() else { return &[] };
    DEVICES.get_or_init(|| {
        let nics = world.profile.nics.iter().enumerate();
        nics.map(|(index, nic)| {
            // SAFETY: a C struct of numbers and pointers.
            let mut device: ibv_device = unsafe { mem::zeroed() };
            device.node_type = IBV_NODE_UNSPECIFIED;
            device.transport_type = IBV_TRANSPORT_UNSPECIFIED;
            put(&mut device.name, &nic.name);
            put(&mut device.dev_name, &format!("uverbs{index}"));
            put(&mut device.dev_path, &format!("/sys/class/infiniband_verbs/uverbs{index}"));
            put(&mut device.ibdev_path, &format!("/sys/class/infiniband/{}", nic.name));
            Device { device, index: index as u16, gid: gid(world.host, index as u16) }
        })
        .collect()
    })
}

// SAFETY: the pointers in an ibv_device are null.
unsafe impl Send for Device {}
// SAFETY: as above; never written after it was made.
unsafe impl Sync for Device {}

/// Copies a text with its final zero, cut to what fits.
fn put(to: &mut [c_char], text: &str) {
    let room = to.len() - 1;
    for (to, from) in to.iter_mut().zip(text.bytes().take(room).chain([0])) {
        *to = from as c_char;
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device {
    let devices = devices();
    let mut list: Vec<*mut ibv_device> =
        devices.iter().map(|device| ptr::from_ref(&device.device).cast_mut()).collect();
    list.push(ptr::null_mut());
    if !count.is_null() {
        // SAFETY: the caller's.
        unsafe { *count = devices.len() as c_int };
    }
    Box::into_raw(list.into_boxed_slice()).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_free_device_list(list: *mut *mut ibv_device) {
    if !list.is_null() {
        // SAFETY: from ibv_get_device_list, and the list has this length.
        drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(list, devices().len() + 1)) });
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char {
    // SAFETY: one of the list.
    unsafe { (*device).name.as_ptr() }
}

fn guid(gid: &[u8; 16]) -> u64 {
    u64::from_ne_bytes(gid[8..].try_into().expect("8 bytes"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_guid(device: *mut ibv_device) -> u64 {
    // SAFETY: one of the list; `device` is the first field.
    guid(unsafe { &(*device.cast::<Device>()).gid })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_device_index(device: *mut ibv_device) -> c_int {
    // SAFETY: as above.
    unsafe { c_int::from((*device.cast::<Device>()).index) }
}

#[unsafe(no_mangle)]
extern "C" fn ibv_fork_init() -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_is_fork_initialized() -> c_int {
    2 // IBV_FORK_UNNEEDED
}

fn pipe(flags: c_int) -> Option<(c_int, c_int)> {
    let mut ends = [0; 2];
    // SAFETY: room for two.
    (unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | flags) } == 0)
        .then_some((ends[0], ends[1]))
}

/// The writing end must never block; the reading end is as the application wants it.
fn event_pipe() -> Option<(c_int, c_int)> {
    let (from, to) = pipe(0)?;
    // SAFETY: a descriptor of ours.
    unsafe { libc::fcntl(to, libc::F_SETFL, libc::O_NONBLOCK) };
    Some((from, to))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context {
    let Some(world) = world::world() else { return null(libc::ENODEV) };
    // SAFETY: one of the list, which lives for ever.
    let device: &'static Device = unsafe { &*device.cast::<Device>() };
    let nic = match world.cluster.nic(world.host, device.index, true) {
        Ok(nic) => nic,
        Err(error) => {
            eprintln!(
                "softefa: {}: NIC {} of host {}: {error}; the directory must be writable, with room for its files",
                world.cluster.dir().display(),
                device.index,
                world.host
            );
            return null(libc::ENODEV);
        }
    };
    nic.reap(|owner| world.cluster.is_alive(owner));
    let Some((events, other)) = event_pipe() else { return ptr::null_mut() };
    // SAFETY: a C struct of numbers and pointers.
    let mut verbs: verbs_context = unsafe { mem::zeroed() };
    verbs.sz = size_of::<verbs_context>();
    verbs.query_port = Some(query_port);
    verbs.query_device_ex = Some(query_device_ex);
    verbs.create_cq_ex = Some(create_cq_ex);
    verbs.create_qp_ex = Some(create_qp_ex);
    let context = &mut verbs.context;
    context.device = ptr::from_ref(&device.device).cast_mut();
    // __VERBS_ABI_IS_EXTENDED: there is a verbs_context around it.
    context.abi_compat = usize::MAX as *mut c_void;
    context.cmd_fd = -1;
    context.async_fd = events;
    context.num_comp_vectors = 32;
    context.ops.poll_cq = Some(poll_cq);
    context.ops.req_notify_cq = Some(req_notify_cq);
    context.ops.post_send = Some(post_send);
    context.ops.post_recv = Some(post_recv);
    // Zeroes are PTHREAD_MUTEX_INITIALIZER.
    let context = Box::leak(Context::new(verbs, world, device, nic, other));
    agent::add_context(context);
    world.say(|| format!("{}: opened", context.name()));
    &raw mut context.verbs.context
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_close_device(context: *mut ibv_context) -> c_int {
    // SAFETY: from ibv_open_device, and not to be used any more.
    let context = unsafe { Context::of(context) };
    agent::remove_context(context);
    // SAFETY: as above; made by Box::leak.
    unsafe {
        libc::close(context.verbs.context.async_fd);
        libc::close(context.events);
        drop(Box::from_raw(ptr::from_ref(context).cast_mut()));
    }
    0
}

impl Context {
    /// Tells the application if the port has gone down or come up.
    pub fn set_port(&self, down: bool) {
        let mut was = self.was_down.lock();
        if *was == down {
            return;
        }
        *was = down;
        self.world.show_port(self.device.index, down);
        let event: ibv_event_type = if down { IBV_EVENT_PORT_ERR } else { IBV_EVENT_PORT_ACTIVE };
        // SAFETY: an open descriptor; four bytes of ours.
        unsafe {
            libc::write(self.events, ptr::from_ref(&event).cast(), size_of::<ibv_event_type>())
        };
    }

    fn spec(&self) -> &softefa_core::profile::NicSpec {
        &self.world.profile.nics[usize::from(self.device.index)]
    }
    fn part_id(&self) -> u32 {
        self.world.config.part_id.unwrap_or(self.spec().vendor_part_id)
    }
    fn send_depth(&self) -> u32 {
        self.world.config.tx_wr.unwrap_or(self.spec().sq_depth)
    }
    /// EFADV_DEVICE_ATTR_CAPS_*: reads, RNR retry, source GIDs; writes, unsolicited receives since p5.
    fn caps(&self) -> u32 {
        let default = if self.part_id() == 0xefa0 { 0x7 } else { 0x1f };
        self.world.config.caps.unwrap_or(default)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_async_event(
    context: *mut ibv_context,
    event: *mut ibv_async_event,
) -> c_int {
    let mut kind: ibv_event_type = 0;
    // SAFETY: an opened device, and the caller's event.
    unsafe {
        let n = libc::read(
            (*context).async_fd,
            ptr::from_mut(&mut kind).cast(),
            size_of::<ibv_event_type>(),
        );
        if n != size_of::<ibv_event_type>() as isize {
            return -1;
        }
        event.write(mem::zeroed());
        (*event).event_type = kind;
        (*event).element.port_num = 1;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_async_event(_event: *mut ibv_async_event) {}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_device(
    context: *mut ibv_context,
    to: *mut ibv_device_attr,
) -> c_int {
    // SAFETY: an opened device, and the caller's struct of numbers.
    let (context, attr) = unsafe {
        to.write(mem::zeroed());
        (Context::of(context), &mut *to)
    };
    put(&mut attr.fw_ver, "0.0.0.0");
    attr.node_guid = guid(&context.device.gid);
    attr.sys_image_guid = attr.node_guid;
    attr.max_mr_size = 1 << 46;
    attr.page_size_cap = 0xffff_ffff_ffff_f000;
    attr.vendor_id = 0x1d0f;
    attr.vendor_part_id = context.part_id();
    attr.hw_ver = context.part_id();
    attr.max_qp = QPS as c_int;
    attr.max_qp_wr = context.send_depth() as c_int;
    attr.max_sge = 2;
    attr.max_sge_rd = 1;
    attr.max_cq = 512;
    attr.max_cqe = 1 << 17;
    attr.max_mr = softefa_core::shared::MRS as c_int;
    attr.max_pd = 256;
    attr.max_ah = AHS as c_int;
    attr.phys_port_cnt = 1;
    0
}

unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    _input: *const ibv_query_device_ex_input,
    to: *mut ibv_device_attr_ex,
    size: usize,
) -> c_int {
    // SAFETY: the caller's struct of `size` bytes, of which the first field is the old one.
    unsafe {
        ptr::write_bytes(to.cast::<u8>(), 0, size);
        ibv_query_device(context, &raw mut (*to).orig_attr)
    }
}

unsafe extern "C" fn query_port(
    context: *mut ibv_context,
    port: u8,
    to: *mut ibv_port_attr,
    size: usize,
) -> c_int {
    if port != 1 {
        return libc::EINVAL;
    }
    // SAFETY: an opened device.
    let context = unsafe { Context::of(context) };
    let time = cluster::now();
    let down = crate::faults::current(context.world)
        .is_some_and(|view| view.nic(context.world.host, context.device.index, time).down);
    // SAFETY: a C struct of numbers.
    let mut attr: ibv_port_attr = unsafe { mem::zeroed() };
    attr.state = if down { IBV_PORT_DOWN } else { IBV_PORT_ACTIVE };
    attr.max_mtu = IBV_MTU_4096;
    attr.active_mtu = IBV_MTU_4096;
    attr.gid_tbl_len = 1;
    attr.pkey_tbl_len = 1;
    attr.max_msg_sz = softefa_core::shared::MTU as u32;
    attr.max_vl_num = 1;
    attr.active_width = 2; // four lanes
    attr.active_speed = match context.spec().speed {
        0..=100 => 32,   // EDR
        101..=200 => 64, // HDR
        _ => 128,        // NDR
    };
    attr.phys_state = if down { 3 } else { 5 };
    // SAFETY: the caller's struct has `size` bytes; older ones are shorter.
    unsafe { answer(to, attr, size as u32) }
}

/// What programs call that were built before 2018, with the struct of then, a prefix of today's.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_port(
    context: *mut ibv_context,
    port: u8,
    to: *mut ibv_port_attr,
) -> c_int {
    // SAFETY: as the callee wants it; `flags` was the last of the old fields.
    unsafe { query_port(context, port, to, mem::offset_of!(ibv_port_attr, port_cap_flags2)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_gid(
    context: *mut ibv_context,
    port: u8,
    index: c_int,
    to: *mut ibv_gid,
) -> c_int {
    if port != 1 || index != 0 {
        set_errno(libc::EINVAL);
        return -1;
    }
    // SAFETY: an opened device, and the caller's GID.
    unsafe { (*to).raw = Context::of(context).device.gid };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_pkey(
    _context: *mut ibv_context,
    _port: u8,
    _index: c_int,
    to: *mut u16,
) -> c_int {
    // SAFETY: the caller's.
    unsafe { *to = 0xffff };
    0
}

/// Writes at most `length` bytes of `value`, and zeroes if `length` is more.
unsafe fn answer<T>(to: *mut T, value: T, length: u32) -> c_int {
    let length = length as usize;
    // SAFETY: the caller's struct has `length` bytes.
    unsafe {
        ptr::write_bytes(to.cast::<u8>(), 0, length);
        ptr::copy_nonoverlapping(
            ptr::from_ref(&value).cast::<u8>(),
            to.cast::<u8>(),
            length.min(size_of::<T>()),
        );
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_query_device(
    context: *mut ibv_context,
    to: *mut efadv_device_attr,
    length: u32,
) -> c_int {
    // SAFETY: an opened device; a C struct of numbers.
    let (context, mut attr): (_, efadv_device_attr) =
        unsafe { (Context::of(context), mem::zeroed()) };
    attr.max_sq_wr = context.send_depth();
    attr.max_rq_wr = context.world.config.rx_wr;
    attr.max_sq_sge = 2;
    attr.max_rq_sge = 4;
    attr.inline_buf_size = INLINE as u16;
    attr.device_caps = context.caps();
    attr.max_rdma_size = if attr.device_caps & 1 != 0 { context.world.config.max_rdma } else { 0 };
    // SAFETY: the caller's struct has `length` bytes.
    unsafe { answer(to, attr, length) }
}

// ------------------------------------------------- protection domains, regions, address handles

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd {
    Box::into_raw(Box::new(ibv_pd { context, handle: 0 }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int {
    // SAFETY: from ibv_alloc_pd.
    drop(unsafe { Box::from_raw(pd) });
    0
}

unsafe fn register(
    pd: *mut ibv_pd,
    address: *mut c_void,
    length: usize,
    iova: u64,
    access: u32,
) -> *mut ibv_mr {
    if length == 0 {
        return null(libc::EINVAL);
    }
    // SAFETY: a domain of an opened device.
    let context = unsafe { Context::of((*pd).context) };
    let world = context.world;
    let most = world.config.pages;
    let pages = pages::count(address as u64, length as u64, most);
    let nic = context.nic;
    let Some(key) =
        nic.take_mr(world.me(), address as u64, length as u64, iova, access, pages, most)
    else {
        world.say(|| {
            format!("{}: no room for a region of {length} bytes ({pages} pages)", context.name())
        });
        return null(libc::ENOMEM);
    };
    // SAFETY: a C struct of numbers and pointers.
    let mut mr: ibv_mr = unsafe { mem::zeroed() };
    mr.context = (&raw const context.verbs.context).cast_mut();
    mr.pd = pd;
    mr.addr = address;
    mr.length = length;
    mr.lkey = key;
    mr.rkey = key;
    Box::into_raw(Box::new(Region { mr, mapping: None })).cast()
}

/// A memory region. The first field is what applications hold.
#[repr(C)]
struct Region {
    mr: ibv_mr,
    /// Of a dmabuf: where this process has it mapped, for the emulated NICs' use.
    mapping: Option<Mapping>,
}

/// Memory by its file, which need not be anywhere else in this process's reach.
struct Mapping {
    start: *mut c_void,
    length: usize,
}

impl Mapping {
    fn new(fd: c_int, offset: u64, length: usize) -> io::Result<Mapping> {
        let end = offset.checked_add(length as u64);
        // SAFETY: a C struct of numbers; the descriptor is only looked at. A fresh mapping at an address of the
        // kernel's choice.
        unsafe {
            let mut stat: libc::stat = mem::zeroed();
            if libc::fstat(fd, &mut stat) != 0 {
                return Err(io::Error::last_os_error());
            }
            if end.is_none_or(|end| end > stat.st_size as u64) {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(
                ptr::null_mut(),
                length,
                both,
                libc::MAP_SHARED,
                fd,
                offset as libc::off_t,
            );
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(Mapping { start, length })
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whose region is gone or was never made.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

/// Whether the CPU, which does the NIC's work here, reaches the range's ends: where it does not, a NIC could not pin
/// them.
fn is_mapped(address: u64, length: u64) -> bool {
    let mut bytes = [0u8; 2];
    let here = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 2 };
    let at = |address: u64| libc::iovec { iov_base: address as *mut c_void, iov_len: 1 };
    let there = [at(address), at(address.saturating_add(length - 1))];
    // SAFETY: the kernel checks what is read, and our two bytes are ours.
    unsafe { libc::process_vm_readv(libc::getpid(), &here, 1, there.as_ptr(), 2, 0) == 2 }
}

unsafe fn register_here(
    pd: *mut ibv_pd,
    address: *mut c_void,
    length: usize,
    iova: u64,
    access: u32,
) -> *mut ibv_mr {
    if length > 0 && !is_mapped(address as u64, length as u64) {
        return null(libc::EFAULT);
    }
    // SAFETY: as the callee wants it.
    unsafe { register(pd, address, length, iova, access) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr(
    pd: *mut ibv_pd,
    address: *mut c_void,
    length: usize,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: as the callee wants it.
    unsafe { register_here(pd, address, length, address as u64, access as u32) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova(
    pd: *mut ibv_pd,
    address: *mut c_void,
    length: usize,
    iova: u64,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: as the callee wants it.
    unsafe { register_here(pd, address, length, iova, access as u32) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_mr_iova2(
    pd: *mut ibv_pd,
    address: *mut c_void,
    length: usize,
    iova: u64,
    access: c_uint,
) -> *mut ibv_mr {
    // SAFETY: as the callee wants it.
    unsafe { register_here(pd, address, length, iova, access) }
}

/// Memory by its file, which stands for a GPU's: what can be mapped is taken, as a memfd can.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_reg_dmabuf_mr(
    pd: *mut ibv_pd,
    offset: u64,
    length: usize,
    iova: u64,
    fd: c_int,
    access: c_int,
) -> *mut ibv_mr {
    // SAFETY: a question to the C library.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) as u64 };
    let inside = (offset % page) as usize;
    let mapping = match Mapping::new(fd, offset - inside as u64, length.saturating_add(inside)) {
        Ok(mapping) => mapping,
        Err(error) => return null(error.raw_os_error().unwrap_or(libc::EINVAL)),
    };
    // SAFETY: as the callee wants it; inside the mapping.
    unsafe {
        let address = mapping.start.byte_add(inside);
        let mr = register(pd, address, length, iova, access as u32).cast::<Region>();
        if !mr.is_null() {
            // As rdma-core has it.
            (*mr).mr.addr = offset as *mut c_void;
            (*mr).mapping = Some(mapping);
        }
        mr.cast()
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int {
    // SAFETY: from one of the functions above.
    unsafe {
        Context::of((*mr).context).nic.free_mr((*mr).rkey);
        drop(Box::from_raw(mr.cast::<Region>()));
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_query_mr(_mr: *mut ibv_mr, to: *mut c_void, length: u32) -> c_int {
    // SAFETY: the caller's struct; nothing in it is valid, as `ic_id_validity` 0 says.
    unsafe { ptr::write_bytes(to.cast::<u8>(), 0, length as usize) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    // SAFETY: a domain of an opened device, and the caller's attributes.
    let (context, raw) = unsafe { (Context::of((*pd).context), (*attr).grh.dgid.raw) };
    let Some((host, nic)) = place_of(raw) else { return null(libc::EINVAL) };
    let Some(number) = context.add_peer(host, nic) else { return null(libc::ENOMEM) };
    let ah = ibv_ah { context: (&raw const context.verbs.context).cast_mut(), pd, handle: 0 };
    Box::into_raw(Box::new(Ah { ah, number })).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_ah(ah: *mut ibv_ah) -> c_int {
    // SAFETY: from ibv_create_ah.
    let ah = unsafe { Box::from_raw(ah.cast::<Ah>()) };
    // SAFETY: its device is open.
    unsafe { Context::of(ah.ah.context) }.remove_peer(ah.number);
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_query_ah(ah: *mut ibv_ah, to: *mut efadv_ah_attr, length: u32) -> c_int {
    // SAFETY: from ibv_create_ah; a C struct of numbers; the caller's struct has `length` bytes.
    unsafe {
        let mut attr: efadv_ah_attr = mem::zeroed();
        attr.ahn = (*ah.cast::<Ah>()).number;
        answer(to, attr, length)
    }
}

// ------------------------------------------------------------------- completion queues

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel {
    let Some((fd, other)) = event_pipe() else { return ptr::null_mut() };
    let channel = ibv_comp_channel { context, fd, refcnt: 0 };
    Box::into_raw(Box::new(Channel { channel, other })).cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int {
    // SAFETY: from ibv_create_comp_channel.
    unsafe {
        if (*channel).refcnt != 0 {
            return libc::EBUSY;
        }
        let channel = Box::from_raw(channel.cast::<Channel>());
        libc::close(channel.channel.fd);
        libc::close(channel.other);
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    let mut handle = 0u64;
    // SAFETY: a channel, and the caller's pointers. What is read is the address of a queue that was
    // not destroyed: its events are to be acknowledged first.
    unsafe {
        if libc::read((*channel).fd, ptr::from_mut(&mut handle).cast(), 8) != 8 {
            return -1;
        }
        *cq = handle as *mut ibv_cq;
        *cq_context = (**cq).cq_context;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_ack_cq_events(cq: *mut ibv_cq, events: c_uint) {
    // SAFETY: a queue.
    unsafe { (*cq).comp_events_completed += events };
}

unsafe fn make_cq(
    context: *mut ibv_context,
    entries: u32,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
) -> *mut Cq {
    if entries == 0 || entries > 1 << 20 {
        return null(libc::EINVAL);
    }
    // SAFETY: a C struct of numbers, pointers, and a mutex and a condition, which zeroes initialise.
    let mut ex: ibv_cq_ex = unsafe { mem::zeroed() };
    ex.context = context;
    ex.channel = channel;
    ex.cq_context = cq_context;
    ex.cqe = entries.max(2).next_power_of_two() as c_int;
    ex.start_poll = Some(start_poll);
    ex.next_poll = Some(next_poll);
    ex.end_poll = Some(end_poll);
    ex.read_opcode = Some(read_opcode);
    ex.read_vendor_err = Some(read_vendor_err);
    ex.read_byte_len = Some(read_byte_len);
    ex.read_imm_data = Some(read_imm_data);
    ex.read_qp_num = Some(read_qp_num);
    ex.read_src_qp = Some(read_src_qp);
    ex.read_wc_flags = Some(read_wc_flags);
    ex.read_slid = Some(read_slid);
    ex.read_sl = Some(read_nothing);
    ex.read_dlid_path_bits = Some(read_nothing);
    let dv = DvCq {
        comp_mask: 0,
        wc_read_sgid: Some(wc_read_sgid),
        wc_is_unsolicited: Some(wc_is_unsolicited),
    };
    if !channel.is_null() {
        // SAFETY: a channel.
        unsafe { (*channel).refcnt += 1 };
    }
    // SAFETY: an opened device.
    let cq = Box::leak(Cq::new(unsafe { Context::of(context) }, ex, dv, entries));
    agent::add_cq(cq);
    cq
}

unsafe extern "C" fn create_cq_ex(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
) -> *mut ibv_cq_ex {
    // SAFETY: the caller's attributes.
    unsafe { make_cq(context, (*attr).cqe, (*attr).cq_context, (*attr).channel).cast() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_cq(
    context: *mut ibv_context,
    entries: c_int,
    cq_context: *mut c_void,
    channel: *mut ibv_comp_channel,
    _vector: c_int,
) -> *mut ibv_cq {
    // SAFETY: as the callee wants it.
    unsafe { make_cq(context, entries.max(0) as u32, cq_context, channel).cast() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_create_cq(
    context: *mut ibv_context,
    attr: *mut ibv_cq_init_attr_ex,
    _efa: *mut c_void,
    _length: u32,
) -> *mut ibv_cq_ex {
    // SAFETY: as the callee wants it.
    unsafe { create_cq_ex(context, attr) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_cq_from_ibv_cq_ex(cq: *mut ibv_cq_ex) -> *mut DvCq {
    // SAFETY: a queue.
    unsafe { &raw mut (*cq.cast::<Cq>()).dv }
}

unsafe fn of_dv<'a>(dv: *mut DvCq) -> &'a Cq {
    // SAFETY: from efadv_cq_from_ibv_cq_ex.
    unsafe { &*dv.byte_sub(mem::offset_of!(Cq, dv)).cast::<Cq>() }
}

unsafe extern "C" fn wc_read_sgid(dv: *mut DvCq, to: *mut ibv_gid) -> c_int {
    // SAFETY: a queue that is polled, and the caller's GID.
    unsafe {
        match of_dv(dv).current().source_gid() {
            Some(raw) => (*to).raw = raw,
            None => return -libc::ENOENT,
        }
    }
    0
}

unsafe extern "C" fn wc_is_unsolicited(dv: *mut DvCq) -> bool {
    // SAFETY: a queue that is polled.
    unsafe { of_dv(dv) }.current().is_unsolicited()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int {
    // SAFETY: a queue.
    let this = unsafe { Cq::of(cq.cast()) };
    if !this.qps.lock().is_empty() {
        return libc::EBUSY;
    }
    agent::remove_cq(this);
    // SAFETY: made by Box::leak, and nobody knows it any more.
    unsafe {
        if !this.ex.channel.is_null() {
            (*this.ex.channel).refcnt -= 1;
        }
        drop(Box::from_raw(cq.cast::<Cq>()));
    }
    0
}

unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, _attr: *mut ibv_poll_cq_attr) -> c_int {
    // SAFETY: a queue.
    unsafe { Cq::of(cq) }.start_poll()
}
unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: a queue that is polled.
    unsafe { Cq::of(cq) }.next_poll()
}
unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    // SAFETY: a queue that is polled.
    unsafe { Cq::of(cq).end_poll() }
}
unsafe extern "C" fn read_opcode(cq: *mut ibv_cq_ex) -> ibv_wc_opcode {
    // SAFETY: a queue that is polled; so below.
    wc_opcode(&unsafe { Cq::of(cq) }.current())
}
unsafe extern "C" fn read_vendor_err(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: see read_opcode.
    u32::from(unsafe { Cq::of(cq) }.current().status)
}
unsafe extern "C" fn read_byte_len(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: see read_opcode.
    let entry = unsafe { Cq::of(cq) }.current();
    if entry.is_receive() { entry.length() } else { 0 }
}
unsafe extern "C" fn read_imm_data(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: see read_opcode.
    unsafe { Cq::of(cq) }.current().imm.to_be()
}
unsafe extern "C" fn read_qp_num(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: see read_opcode.
    u32::from(unsafe { Cq::of(cq) }.current().qp)
}
unsafe extern "C" fn read_src_qp(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: see read_opcode.
    u32::from(unsafe { Cq::of(cq) }.current().source_qp())
}
unsafe extern "C" fn read_wc_flags(cq: *mut ibv_cq_ex) -> c_uint {
    // SAFETY: see read_opcode.
    if unsafe { Cq::of(cq) }.current().has_imm() { IBV_WC_WITH_IMM } else { 0 }
}
unsafe extern "C" fn read_slid(cq: *mut ibv_cq_ex) -> u32 {
    // SAFETY: see read_opcode.
    u32::from(unsafe { Cq::of(cq) }.current().ah())
}
unsafe extern "C" fn read_nothing(_cq: *mut ibv_cq_ex) -> u8 {
    0
}

unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, most: c_int, to: *mut ibv_wc) -> c_int {
    // SAFETY: a queue, and room for `most`.
    let this = unsafe { Cq::of(cq.cast()) };
    let mut done = 0;
    while done < most {
        match this.start_poll() {
            0 => {}
            libc::EINVAL => continue,
            _ => break,
        }
        let entry = this.current();
        // SAFETY: a C struct of numbers; the caller's room; polled, and so to be ended.
        unsafe {
            let mut wc: ibv_wc = mem::zeroed();
            wc.wr_id = this.ex.wr_id;
            wc.status = wc_status(entry.status);
            wc.opcode = wc_opcode(&entry);
            wc.vendor_err = u32::from(entry.status);
            wc.byte_len = if entry.is_receive() { entry.length() } else { 0 };
            wc.__bindgen_anon_1.imm_data = entry.imm.to_be();
            wc.qp_num = u32::from(entry.qp);
            wc.src_qp = u32::from(entry.source_qp());
            wc.slid = entry.ah();
            wc.wc_flags = if entry.has_imm() { IBV_WC_WITH_IMM } else { 0 };
            to.add(done as usize).write(wc);
            this.end_poll();
        }
        done += 1;
    }
    done
}

unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, _solicited_only: c_int) -> c_int {
    // SAFETY: a queue.
    let this = unsafe { Cq::of(cq.cast()) };
    this.armed.store(true, Ordering::SeqCst);
    for &qp in this.qps.lock().iter() {
        // SAFETY: a queue pair leaves this list before it is freed.
        unsafe { &*qp }.shared.armed.store(1, Ordering::SeqCst);
    }
    fence(Ordering::SeqCst);
    if this.is_ready() {
        this.fire();
    } else {
        agent::call(this.context().world);
    }
    0
}

/// `efadv_cq_attr` of libefa since 2025.
#[repr(C)]
struct CqAttr {
    comp_mask: u64,
    buffer: *mut u8,
    entry_size: u32,
    num_entries: u32,
    doorbell: *mut u32,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_query_cq(cq: *mut ibv_cq, to: *mut c_void, length: u32) -> c_int {
    // SAFETY: a queue.
    let this = unsafe { Cq::of(cq.cast()) };
    if !this.context().world.config.direct {
        return libc::EOPNOTSUPP;
    }
    let (buffer, num_entries) = this.expose();
    let attr = CqAttr {
        comp_mask: 0,
        buffer,
        entry_size: size_of::<wire::Cdesc>() as u32,
        num_entries,
        doorbell: this.doorbell.as_ptr(),
    };
    // SAFETY: the caller's struct has `length` bytes.
    unsafe { answer(to.cast(), attr, length) }
}

// ------------------------------------------------------------------------- queue pairs

unsafe fn make_qp(
    pd: *mut ibv_pd,
    cap: &ibv_qp_cap,
    queues: (*mut ibv_cq, *mut ibv_cq),
    qp_context: *mut c_void,
    kind: ibv_qp_type,
    signal_all: bool,
    unsolicited: bool,
) -> *mut ibv_qp {
    // SAFETY: a domain of an opened device.
    let context = unsafe { Context::of((*pd).context) };
    if cap.max_send_wr > context.send_depth() || cap.max_recv_wr > context.world.config.rx_wr {
        return null(libc::EINVAL);
    }
    // SAFETY: a C struct of numbers, pointers, and a mutex and a condition, which zeroes initialise.
    let mut ex: ibv_qp_ex = unsafe { mem::zeroed() };
    ex.qp_base.context = (&raw const context.verbs.context).cast_mut();
    ex.qp_base.qp_context = qp_context;
    ex.qp_base.pd = pd;
    (ex.qp_base.send_cq, ex.qp_base.recv_cq) = queues;
    ex.qp_base.qp_type = kind;
    ex.qp_base.state = IBV_QPS_RESET;
    ex.wr_start = Some(wr_start);
    ex.wr_complete = Some(wr_complete);
    ex.wr_abort = Some(wr_abort);
    ex.wr_send = Some(wr_send);
    ex.wr_send_imm = Some(wr_send_imm);
    ex.wr_rdma_read = Some(wr_rdma_read);
    ex.wr_rdma_write = Some(wr_rdma_write);
    ex.wr_rdma_write_imm = Some(wr_rdma_write_imm);
    ex.wr_set_inline_data = Some(wr_set_inline_data);
    ex.wr_set_inline_data_list = Some(wr_set_inline_data_list);
    ex.wr_set_sge = Some(wr_set_sge);
    ex.wr_set_sge_list = Some(wr_set_sge_list);
    ex.wr_set_ud_addr = Some(wr_set_ud_addr);
    let wanted = Wanted {
        is_ud: kind == IBV_QPT_UD,
        unsolicited,
        signal_all,
        send_wr: cap.max_send_wr,
        recv_wr: cap.max_recv_wr,
        recv_sge: cap.max_recv_sge,
    };
    let Some(mut qp) = Qp::new(context, ex, &wanted) else { return null(libc::ENOMEM) };
    qp.ex.qp_base.qp_num = u32::from(qp.number);
    let qp = Box::leak(qp);
    context.qps[usize::from(qp.number)].store(qp, Ordering::Release);
    qp.send_cq().qps.lock().push(qp);
    if queues.0 != queues.1 {
        qp.recv_cq().qps.lock().push(qp);
    }
    // What was asked for before there was a queue pair to tell (libfabric does when it opens a queue).
    if qp.recv_cq().armed.load(Ordering::SeqCst) {
        qp.shared.armed.store(1, Ordering::SeqCst);
    }
    context.world.say(|| {
        format!(
            "{}: queue pair {}, {} sends, {} receives",
            context.name(),
            qp.number,
            cap.max_send_wr,
            cap.max_recv_wr
        )
    });
    ptr::from_mut(qp).cast()
}

unsafe extern "C" fn create_qp_ex(
    _context: *mut ibv_context,
    attr: *mut ibv_qp_init_attr_ex,
) -> *mut ibv_qp {
    // SAFETY: the caller's attributes.
    unsafe {
        let a = &*attr;
        make_qp(
            a.pd,
            &a.cap,
            (a.send_cq, a.recv_cq),
            a.qp_context,
            a.qp_type,
            a.sq_sig_all != 0,
            false,
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the caller's attributes.
    unsafe {
        let a = &*attr;
        make_qp(
            pd,
            &a.cap,
            (a.send_cq, a.recv_cq),
            a.qp_context,
            a.qp_type,
            a.sq_sig_all != 0,
            false,
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_create_qp_ex(
    _context: *mut ibv_context,
    attr: *mut ibv_qp_init_attr_ex,
    efa: *mut c_void,
    length: u32,
) -> *mut ibv_qp {
    // After comp_mask and driver_qp_type there are, since 2023, 16 bits of flags; bit 0 is
    // EFADV_QP_FLAGS_UNSOLICITED_WRITE_RECV.
    // SAFETY: the caller's structs, the second of `length` bytes.
    unsafe {
        let flags = if length >= 16 { efa.byte_add(12).cast::<u16>().read() } else { 0 };
        let a = &*attr;
        make_qp(
            a.pd,
            &a.cap,
            (a.send_cq, a.recv_cq),
            a.qp_context,
            a.qp_type,
            a.sq_sig_all != 0,
            flags & 1 != 0,
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_create_driver_qp(
    pd: *mut ibv_pd,
    attr: *mut ibv_qp_init_attr,
    _kind: u32,
) -> *mut ibv_qp {
    // SAFETY: the caller's attributes.
    unsafe {
        let a = &*attr;
        make_qp(
            pd,
            &a.cap,
            (a.send_cq, a.recv_cq),
            a.qp_context,
            IBV_QPT_DRIVER,
            a.sq_sig_all != 0,
            false,
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex {
    qp.cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int {
    // SAFETY: a queue pair, and the caller's attributes.
    unsafe {
        let (this, attr, mask) = (Qp::of(qp.cast()), &*attr, mask as u32);
        if mask & IBV_QP_QKEY != 0 {
            this.shared.qkey.store(attr.qkey, Ordering::Release);
        }
        if mask & IBV_QP_RNR_RETRY != 0 {
            this.rnr_retry.store(u32::from(attr.rnr_retry), Ordering::Relaxed);
        }
        if mask & IBV_QP_STATE != 0 {
            (*qp).state = attr.qp_state;
            let ready = matches!(attr.qp_state, IBV_QPS_RTR | IBV_QPS_RTS);
            let state = if ready { QpState::Ready } else { QpState::Reset };
            this.shared.state.store(state as u32, Ordering::Release);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_query_qp(
    qp: *mut ibv_qp,
    to: *mut ibv_qp_attr,
    _mask: c_int,
    _init: *mut ibv_qp_init_attr,
) -> c_int {
    // SAFETY: a queue pair, and the caller's struct of numbers.
    unsafe {
        to.write(mem::zeroed());
        (*to).qp_state = (*qp).state;
        (*to).cur_qp_state = (*qp).state;
        (*to).qkey = Qp::of(qp.cast()).shared.qkey.load(Ordering::Relaxed);
        (*to).port_num = 1;
    }
    0
}

#[unsafe(no_mangle)]
extern "C" fn ibv_query_qp_data_in_order(
    _qp: *mut ibv_qp,
    _op: ibv_wr_opcode,
    _flags: u32,
) -> c_int {
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int {
    // SAFETY: a queue pair.
    let this = unsafe { Qp::of(qp.cast()) };
    // SAFETY: its device is open.
    let context = unsafe { Context::of((*qp).context) };
    // No packet more first, then nobody who works for it, then its completions.
    this.shared.state.store(QpState::Reset as u32, Ordering::SeqCst);
    for cq in [this.send_cq(), this.recv_cq()] {
        cq.qps.lock().retain(|&other| !ptr::eq(other, this));
        cq.forget(this.number);
    }
    context.qps[usize::from(this.number)].store(ptr::null_mut(), Ordering::Release);
    context.nic.free_qp(this.number);
    // SAFETY: made by Box::leak, and nobody knows it any more.
    drop(unsafe { Box::from_raw(qp.cast::<Qp>()) });
    0
}

/// `efadv_wq_attr` of libefa since 2025.
#[repr(C)]
struct WqAttr {
    comp_mask: u64,
    buffer: *mut u8,
    entry_size: u32,
    num_entries: u32,
    doorbell: *mut u32,
    max_batch: u32,
    caps: u16,
    reserved: [u8; 2],
}

#[unsafe(no_mangle)]
unsafe extern "C" fn efadv_query_qp_wqs(
    qp: *mut ibv_qp,
    sq: *mut c_void,
    rq: *mut c_void,
    length: u32,
) -> c_int {
    // SAFETY: a queue pair.
    let this = unsafe { Qp::of(qp.cast()) };
    // SAFETY: its device is open.
    if !unsafe { Context::of((*qp).context) }.world.config.direct {
        return libc::EOPNOTSUPP;
    }
    this.expose();
    let send = WqAttr {
        comp_mask: 0,
        buffer: this.sq.base(),
        entry_size: size_of::<TxWqe>() as u32,
        num_entries: this.sq.len() as u32,
        doorbell: this.sq.doorbell.as_ptr(),
        max_batch: 16,
        // Nothing: 64-bit request ids would do too, and the shorter ones are what most devices have.
        caps: 0,
        reserved: [0; 2],
    };
    let receive = WqAttr {
        buffer: this.rq.base(),
        entry_size: size_of::<wire::RxDesc>() as u32,
        num_entries: this.rq.len() as u32,
        doorbell: this.rq.doorbell.as_ptr(),
        max_batch: this.rq.len() as u32,
        ..send
    };
    // SAFETY: the caller's structs have `length` bytes.
    unsafe {
        answer(sq.cast(), send, length);
        answer(rq.cast(), receive, length)
    }
}

// ------------------------------------------------- posting: built in a batch until wr_complete

/// The sender's side of a queue pair between wr_start and wr_complete or wr_abort.
unsafe fn building<'a>(qp: *mut ibv_qp_ex) -> (&'a Qp, &'a mut Sender) {
    // SAFETY: a queue pair, whose lock this thread holds since wr_start.
    unsafe {
        let this = Qp::of(qp);
        (this, &mut *this.send.data_ptr())
    }
}

unsafe extern "C" fn wr_start(qp: *mut ibv_qp_ex) {
    // SAFETY: a queue pair; wr_complete and wr_abort unlock.
    mem::forget(unsafe { Qp::of(qp) }.send.lock());
    // SAFETY: locked.
    let (_, sender) = unsafe { building(qp) };
    sender.batch.clear();
    sender.error = 0;
}

unsafe extern "C" fn wr_abort(qp: *mut ibv_qp_ex) {
    // SAFETY: begun by wr_start.
    let (this, sender) = unsafe { building(qp) };
    this.give_room(sender.batch.len() as u32);
    sender.batch.clear();
    // SAFETY: locked by wr_start.
    unsafe { this.send.force_unlock() };
}

unsafe extern "C" fn wr_complete(qp: *mut ibv_qp_ex) -> c_int {
    // SAFETY: begun by wr_start.
    let (this, sender) = unsafe { building(qp) };
    let mut batch = mem::take(&mut sender.batch);
    let error = sender.error;
    if error == 0 {
        for wqe in batch.drain(..) {
            this.post(sender, wqe);
        }
    } else {
        this.give_room(batch.len() as u32);
        batch.clear();
    }
    // Its memory is kept for the next.
    sender.batch = batch;
    // SAFETY: locked by wr_start.
    unsafe { this.send.force_unlock() };
    error
}

unsafe fn begin(qp: *mut ibv_qp_ex, op: u8, imm: Option<u32>, remote: Option<(u64, u32)>) {
    // SAFETY: begun by wr_start; the application's fields are its own.
    let (this, sender, id, flags) = unsafe {
        let (this, sender) = building(qp);
        (this, sender, (*qp).wr_id, (*qp).wr_flags)
    };
    if sender.error != 0 {
        return;
    }
    if !this.take_room(sender, op) {
        sender.error = libc::ENOMEM;
        return;
    }
    let mut wqe = TxWqe::new(op, id, this.signal_all || flags & IBV_SEND_SIGNALED != 0);
    if let Some(imm) = imm {
        wqe.set_imm(u32::from_be(imm));
    }
    if let Some((address, rkey)) = remote {
        wqe.set_remote(address, rkey);
    }
    sender.batch.push(wqe);
}

unsafe extern "C" fn wr_send(qp: *mut ibv_qp_ex) {
    // SAFETY: begun by wr_start; so below.
    unsafe { begin(qp, wire::SEND, None, None) }
}
unsafe extern "C" fn wr_send_imm(qp: *mut ibv_qp_ex, imm: u32) {
    // SAFETY: see wr_send.
    unsafe { begin(qp, wire::SEND, Some(imm), None) }
}
unsafe extern "C" fn wr_rdma_read(qp: *mut ibv_qp_ex, rkey: u32, address: u64) {
    // SAFETY: see wr_send.
    unsafe { begin(qp, wire::READ, None, Some((address, rkey))) }
}
unsafe extern "C" fn wr_rdma_write(qp: *mut ibv_qp_ex, rkey: u32, address: u64) {
    // SAFETY: see wr_send.
    unsafe { begin(qp, wire::WRITE, None, Some((address, rkey))) }
}
unsafe extern "C" fn wr_rdma_write_imm(qp: *mut ibv_qp_ex, rkey: u32, address: u64, imm: u32) {
    // SAFETY: see wr_send.
    unsafe { begin(qp, wire::WRITE, Some(imm), Some((address, rkey))) }
}

/// Changes the work request that was begun last; `change` says whether that can be.
unsafe fn change(qp: *mut ibv_qp_ex, change: impl FnOnce(&mut TxWqe) -> bool) {
    // SAFETY: begun by wr_start.
    let (_, sender) = unsafe { building(qp) };
    if sender.error != 0 {
        return;
    }
    if !sender.batch.last_mut().is_some_and(change) {
        sender.error = libc::EINVAL;
    }
}

unsafe extern "C" fn wr_set_sge_list(qp: *mut ibv_qp_ex, count: usize, list: *const ibv_sge) {
    let list = if count == 0 {
        &[]
    } else {
        // SAFETY: the caller's list.
        unsafe { slice::from_raw_parts(list, count) }
    };
    // SAFETY: see wr_send.
    unsafe {
        change(qp, |wqe| {
            list.iter().all(|sge| {
                wqe.push_buffer(Buffer { address: sge.addr, length: sge.length, lkey: sge.lkey })
            })
        });
    }
}

unsafe extern "C" fn wr_set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    // SAFETY: see wr_send.
    unsafe { wr_set_sge_list(qp, 1, &ibv_sge { addr, length, lkey }) }
}

unsafe extern "C" fn wr_set_inline_data_list(
    qp: *mut ibv_qp_ex,
    count: usize,
    list: *const ibv_data_buf,
) {
    // SAFETY: see wr_send; the caller's list of its buffers.
    unsafe {
        change(qp, |wqe| {
            (0..count).all(|k| {
                let buffer = &*list.add(k);
                let bytes = if buffer.length == 0 {
                    &[]
                } else {
                    slice::from_raw_parts(buffer.addr.cast::<u8>(), buffer.length)
                };
                wqe.push_inline(bytes)
            })
        });
    }
}

unsafe extern "C" fn wr_set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    // SAFETY: see wr_send.
    unsafe { wr_set_inline_data_list(qp, 1, &ibv_data_buf { addr, length }) }
}

unsafe extern "C" fn wr_set_ud_addr(
    qp: *mut ibv_qp_ex,
    ah: *mut ibv_ah,
    remote_qp: u32,
    qkey: u32,
) {
    // SAFETY: see wr_send; a handle of ours.
    unsafe {
        let number = (*ah.cast::<Ah>()).number;
        change(qp, |wqe| {
            wqe.ah = number;
            wqe.dest_qp = remote_qp as u16;
            wqe.qkey = qkey;
            true
        });
    }
}

unsafe extern "C" fn post_send(
    qp: *mut ibv_qp,
    list: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    let ex: *mut ibv_qp_ex = qp.cast();
    let mut next = list;
    // SAFETY: a queue pair, and the caller's list.
    while let Some(wr) = unsafe { next.as_ref() } {
        // SAFETY: as above.
        let error = unsafe {
            wr_start(ex);
            (*ex).wr_id = wr.wr_id;
            (*ex).wr_flags = wr.send_flags;
            match wr.opcode {
                IBV_WR_SEND => wr_send(ex),
                IBV_WR_SEND_WITH_IMM => wr_send_imm(ex, wr.__bindgen_anon_1.imm_data),
                _ => building(ex).1.error = libc::EINVAL,
            }
            let count = wr.num_sge.max(0) as usize;
            if wr.send_flags & IBV_SEND_INLINE != 0 {
                for k in 0..count {
                    let sge = &*wr.sg_list.add(k);
                    wr_set_inline_data(ex, sge.addr as *mut c_void, sge.length as usize);
                }
            } else {
                wr_set_sge_list(ex, count, wr.sg_list);
            }
            let ud = &wr.wr.ud;
            wr_set_ud_addr(ex, ud.ah, ud.remote_qpn, ud.remote_qkey);
            wr_complete(ex)
        };
        if error != 0 {
            // SAFETY: the caller's.
            unsafe { *bad = next };
            return error;
        }
        next = wr.next;
    }
    0
}

unsafe extern "C" fn post_recv(
    qp: *mut ibv_qp,
    list: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    // SAFETY: a queue pair.
    let this = unsafe { Qp::of(qp.cast()) };
    let mut next = list;
    // SAFETY: the caller's list.
    while let Some(wr) = unsafe { next.as_ref() } {
        let buffers = if wr.num_sge <= 0 {
            &[]
        } else {
            // SAFETY: as above.
            unsafe { slice::from_raw_parts(wr.sg_list, wr.num_sge as usize) }
        };
        if let Err(error) = this.post_receive(wr.wr_id, buffers) {
            // SAFETY: the caller's.
            unsafe { *bad = next };
            return error;
        }
        next = wr.next;
    }
    0
}
