//! The CUDA driver, loaded at run time: the functions that are needed, and the contexts that they run in.
//!
//! Nothing here loads the driver into a process that has none, but for [`load`], which somebody has to ask for; and no
//! context is made on a device whose memory nobody has.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use crate::error::{Code, Error, Result};

/// What the driver's functions return (`CUresult`), as far as it is looked at.
pub(super) const SUCCESS: c_int = 0;
const NOT_INITIALIZED: c_int = 3;
const DEINITIALIZED: c_int = 4;
pub(super) const NOT_READY: c_int = 600;
const PEER_ACCESS_ALREADY_ENABLED: c_int = 704;

/// A context of the driver's (`CUcontext`).
pub(super) type RawContext = *mut c_void;

/// `CUipcMemHandle`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RawIpcHandle(pub [u8; 64]);

macro_rules! functions {
    ($($(#[$doc:meta])* $field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The driver's functions, by what `cuda.h` makes of their names.
        pub(super) struct Driver {
            $($(#[$doc])* pub $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Driver {
            /// The functions of a driver that is loaded; the name of the first that it lacks.
            fn of(library: *mut c_void) -> Result<Self, &'static CStr> {
                Ok(Self { $($field: {
                    // SAFETY: an open library and a NUL-terminated name.
                    let symbol = unsafe { libc::dlsym(library, $symbol.as_ptr()) };
                    if symbol.is_null() {
                        return Err($symbol);
                    }
                    // SAFETY: the driver's function of this name has this C signature.
                    unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> c_int>(symbol)
                    }
                },)* })
            }
        }
    };
}

functions! {
    init = c"cuInit"(c_uint);
    error_name = c"cuGetErrorName"(c_int, *mut *const c_char);
    error_string = c"cuGetErrorString"(c_int, *mut *const c_char);
    device_count = c"cuDeviceGetCount"(*mut c_int);
    device = c"cuDeviceGet"(*mut c_int, c_int);
    primary_retain = c"cuDevicePrimaryCtxRetain"(*mut RawContext, c_int);
    primary_release = c"cuDevicePrimaryCtxRelease_v2"(c_int);
    primary_state = c"cuDevicePrimaryCtxGetState"(c_int, *mut c_uint, *mut c_int);
    push = c"cuCtxPushCurrent_v2"(RawContext);
    pop = c"cuCtxPopCurrent_v2"(*mut RawContext);
    current = c"cuCtxGetCurrent"(*mut RawContext);
    enable_peer = c"cuCtxEnablePeerAccess"(RawContext, c_uint);
    can_access_peer = c"cuDeviceCanAccessPeer"(*mut c_int, c_int, c_int);
    pointer = c"cuPointerGetAttribute"(*mut c_void, c_uint, u64);
    set_pointer = c"cuPointerSetAttribute"(*const c_void, c_uint, u64);
    alloc = c"cuMemAlloc_v2"(*mut u64, usize);
    free = c"cuMemFree_v2"(u64);
    pin = c"cuMemHostRegister_v2"(*mut c_void, usize, c_uint);
    unpin = c"cuMemHostUnregister"(*mut c_void);
    copy = c"cuMemcpyAsync"(u64, u64, usize, *mut c_void);
    stream = c"cuStreamCreate"(*mut *mut c_void, c_uint);
    stream_destroy = c"cuStreamDestroy_v2"(*mut c_void);
    stream_wait = c"cuStreamSynchronize"(*mut c_void);
    event = c"cuEventCreate"(*mut *mut c_void, c_uint);
    event_destroy = c"cuEventDestroy_v2"(*mut c_void);
    event_record = c"cuEventRecord"(*mut c_void, *mut c_void);
    event_query = c"cuEventQuery"(*mut c_void);
    ipc_export = c"cuIpcGetMemHandle"(*mut RawIpcHandle, u64);
    ipc_open = c"cuIpcOpenMemHandle_v2"(*mut u64, RawIpcHandle, c_uint);
    ipc_close = c"cuIpcCloseMemHandle"(u64);
}

/// The driver, once it was found.
static DRIVER: OnceLock<Driver> = OnceLock::new();

/// The driver, if it is in this process. Looked for again only when a library has been loaded since: a search that
/// finds nothing goes through the file system.
pub(super) fn driver() -> Option<&'static Driver> {
    static SEARCHED: Mutex<u64> = Mutex::new(0);
    if let Some(driver) = DRIVER.get() {
        return Some(driver);
    }
    let loads = libraries_loaded();
    let mut searched = SEARCHED.lock();
    if *searched != loads {
        *searched = loads;
        // SAFETY: a NUL-terminated name; RTLD_NOLOAD only finds what is loaded already.
        let library = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        if !library.is_null() {
            match Driver::of(library) {
                Ok(driver) => drop(DRIVER.set(driver)),
                Err(missing) => log::warn!(
                    "the CUDA driver in this process lacks {}: device memory cannot be told from host memory",
                    missing.to_string_lossy()
                ),
            }
        }
    }
    DRIVER.get()
}

const NAME: &CStr = c"libcuda.so.1";

/// A function that not every driver has.
pub(super) fn find(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: NUL-terminated names; RTLD_NOLOAD only finds what is loaded already.
    let symbol = unsafe {
        let library = libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
        if library.is_null() {
            return None;
        }
        libc::dlsym(library, name.as_ptr())
    };
    (!symbol.is_null()).then_some(symbol)
}

/// Loads and initialises the driver, for somebody who wants device memory of his own. Makes no context.
///
/// # Errors
/// [`Code::DeviceNotFound`] if there is none, or no GPU.
pub(super) fn load() -> Result<&'static Driver> {
    let none = |why: &str| Error::new(Code::DeviceNotFound, format!("no CUDA on this host: {why}"));
    // SAFETY: a NUL-terminated name; the driver may be loaded into any process.
    if unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null() {
        return Err(none("libcuda.so.1 cannot be loaded; it comes with NVIDIA's driver"));
    }
    let driver = driver().ok_or_else(|| none("its driver lacks functions that are needed"))?;
    // SAFETY: may be called any number of times.
    let ret = unsafe { (driver.init)(0) };
    driver.check("cuInit", ret).map_err(|error| none(&error.text))?;
    Ok(driver)
}

/// How many libraries this process has loaded so far.
pub(super) fn libraries_loaded() -> u64 {
    unsafe extern "C" fn first(
        info: *mut libc::dl_phdr_info,
        _: usize,
        count: *mut c_void,
    ) -> c_int {
        // SAFETY: the loader's own structure, and the number below.
        unsafe { *count.cast::<u64>() = (*info).dlpi_adds };
        1 // no more of them
    }
    let mut count: u64 = 0;
    // SAFETY: the function is called with our number while this call lasts.
    unsafe { libc::dl_iterate_phdr(Some(first), (&raw mut count).cast()) };
    count
}

/// What may be asked about an address (`CUpointer_attribute` of `cuda.h`).
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum Attribute {
    Context = 1,
    MemoryType = 2,
    IsManaged = 8,
    Device = 9,
    RangeStart = 11,
    RangeSize = 12,
}

/// `CU_MEMORYTYPE_HOST` and `CU_MEMORYTYPE_DEVICE`.
pub(super) const HOST_MEMORY: u64 = 1;
pub(super) const DEVICE_MEMORY: u64 = 2;

impl Driver {
    /// What the driver knows of an address; `None` if it does not know it (or was not initialised: then nobody has
    /// memory of it).
    pub fn ask(&self, attribute: Attribute, address: u64) -> Option<u64> {
        let mut value: u64 = 0;
        // SAFETY: the driver writes at most 8 bytes for these attributes; any address may be asked about.
        let ret = unsafe { (self.pointer)((&raw mut value).cast(), attribute as c_uint, address) };
        (ret == SUCCESS).then_some(value)
    }

    /// An error in the driver's words, with the function (`what`) that it is of.
    pub fn check(&self, what: &str, ret: c_int) -> Result<()> {
        if ret == SUCCESS {
            return Ok(());
        }
        let words = |function: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: one pointer is written, to a constant of the driver's, or NULL.
            let known = unsafe { function(ret, &raw mut text) } == SUCCESS && !text.is_null();
            // SAFETY: a NUL-terminated constant.
            known.then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        let name = words(self.error_name).unwrap_or_else(|| "an unknown error".into());
        let text = words(self.error_string).unwrap_or_default();
        Err(Error::new(Code::Memory, format!("{what}: {name} ({ret}), {text}")))
    }
}

/// A context that device memory belongs to, kept from ending while this exists if it is its device's primary one
/// (as PyTorch's and the CUDA runtime's are; another is its maker's to keep).
pub struct Context {
    driver: &'static Driver,
    raw: RawContext,
    /// The device, by CUDA's number in this process.
    device: i32,
    retained: bool,
}

// SAFETY: contexts may be made current by any thread, several at once.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A context is current on this thread; the one before is again when this is dropped.
pub(super) struct Entered<'a>(&'a Context);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: it was pushed by this thread, and what was pushed since has been popped.
        unsafe { (self.0.driver.pop)(&raw mut popped) };
    }
}

impl Context {
    /// The context of device memory at `address`, on `device`. Memory of no context (of CUDA's virtual memory
    /// management, or of a pool) is used in its device's primary one.
    pub(super) fn of(driver: &'static Driver, address: u64, device: i32) -> Result<Arc<Self>> {
        static ALL: Mutex<Vec<Weak<Context>>> = Mutex::new(Vec::new());
        let owner = driver.ask(Attribute::Context, address).unwrap_or(0) as RawContext;
        let mut all = ALL.lock();
        all.retain(|known| known.strong_count() > 0);
        let same = |known: &Arc<Self>| {
            if owner.is_null() {
                known.retained && known.device == device
            } else {
                known.raw == owner
            }
        };
        if let Some(known) = all.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(known);
        }
        let mut context = Self { driver, raw: owner, device, retained: false };
        let (mut flags, mut active) = (0, 0);
        // SAFETY: two numbers are written.
        let ret = unsafe { (driver.primary_state)(device, &raw mut flags, &raw mut active) };
        driver.check("cuDevicePrimaryCtxGetState", ret)?;
        if owner.is_null() || active != 0 {
            context = Self::primary(driver, device)?;
            if !owner.is_null() && context.raw != owner {
                context = Self { driver, raw: owner, device, retained: false };
            }
        }
        let context = Arc::new(context);
        all.push(Arc::downgrade(&context));
        Ok(context)
    }

    /// A device's primary context, which is made if the process has none.
    pub(super) fn primary(driver: &'static Driver, device: i32) -> Result<Self> {
        let mut raw = null_mut();
        // SAFETY: one pointer is written.
        let ret = unsafe { (driver.primary_retain)(&raw mut raw, device) };
        driver.check("cuDevicePrimaryCtxRetain", ret)?;
        Ok(Self { driver, raw, device, retained: true })
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.driver
    }

    /// The device, by CUDA's number in this process.
    pub fn device(&self) -> i32 {
        self.device
    }

    /// Makes it current on this thread.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: it has not ended: retained, or its memory is registered.
        let ret = unsafe { (self.driver.push)(self.raw) };
        self.driver.check("cuCtxPushCurrent", ret)?;
        Ok(Entered(self))
    }

    /// Lets copies between this device's memory and `other`'s go from one to the other directly, where they can.
    pub(crate) fn reach(&self, other: &Self) {
        let mut can = 0;
        // SAFETY: one number is written.
        unsafe { (self.driver.can_access_peer)(&raw mut can, self.device, other.device) };
        if self.device == other.device || can == 0 {
            return;
        }
        if let Ok(_entered) = self.enter() {
            // SAFETY: a context is current, and the other has not ended.
            let ret = unsafe { (self.driver.enable_peer)(other.raw, 0) };
            if ret != SUCCESS && ret != PEER_ACCESS_ALREADY_ENABLED {
                let why = self.driver.check("cuCtxEnablePeerAccess", ret);
                log::info!(
                    "CUDA devices {} and {}: copies go by the host: {}",
                    self.device,
                    other.device,
                    why.map_or_else(|error| error.text, |()| String::new())
                );
            }
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.retained {
            // SAFETY: it was retained once by us.
            unsafe { (self.driver.primary_release)(self.device) };
        }
    }
}

/// Whether the driver says that it has ended, as it does while a process exits: nothing can be or need be done then.
pub(super) fn has_ended(ret: c_int) -> bool {
    matches!(ret, DEINITIALIZED | NOT_INITIALIZED)
}
