//! Finding libfabric at run time, and agreeing on an interface version with it.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use super::bindings as ffi;
use crate::error::{Code, Error, Result};

/// Where libfabric is looked for, after the copy that the process has loaded already: there must be
/// one libfabric in a process (aws-ofi-nccl brings the same one), so we never carry our own.
const PLACES: [&str; 3] = [
    "libfabric.so.1",
    "/opt/amazon/efa/lib/libfabric.so.1",
    "/opt/amazon/efa/lib64/libfabric.so.1",
];

/// The generations of `fi_getinfo`, newest first. `struct fi_info` and what hangs off it only grew
/// at the end, so any of them can be read through our bindings as long as we touch only the fields
/// that 1.17 has.
const GENERATIONS: [&CStr; 5] =
    [c"FABRIC_1.10", c"FABRIC_1.9", c"FABRIC_1.8", c"FABRIC_1.7", c"FABRIC_1.3"];

const OLDEST_API: u32 = version(1, 17);
/// From here on an endpoint can be kept from calling CUDA, and with that from `shm`.
pub(super) const OLDEST_HMEM: u32 = version(1, 18);
const BINDINGS_API: u32 = version(ffi::FI_MAJOR_VERSION, ffi::FI_MINOR_VERSION);

pub(super) const fn version(major: u32, minor: u32) -> u32 {
    (major << 16) | minor
}

type GetInfo = unsafe extern "C" fn(
    u32,
    *const c_char,
    *const c_char,
    u64,
    *const ffi::fi_info,
    *mut *mut ffi::fi_info,
) -> c_int;
type FreeInfo = unsafe extern "C" fn(*mut ffi::fi_info);
type DupInfo = unsafe extern "C" fn(*const ffi::fi_info) -> *mut ffi::fi_info;
type OpenFabric =
    unsafe extern "C" fn(*mut ffi::fi_fabric_attr, *mut *mut ffi::fid_fabric, *mut c_void) -> c_int;
type Version = unsafe extern "C" fn() -> u32;
type StrError = unsafe extern "C" fn(c_int) -> *const c_char;

/// The libfabric of this process. Loaded once, never unloaded.
pub struct Libfabric {
    pub(super) getinfo: GetInfo,
    pub(super) freeinfo: FreeInfo,
    pub(super) dupinfo: DupInfo,
    pub(super) fabric: OpenFabric,
    strerror: StrError,
    /// The interface version agreed on, as `FI_VERSION` packs it.
    pub(super) api: u32,
    library: u32,
    path: String,
}

impl Libfabric {
    /// The process's libfabric, found and loaded on the first call.
    ///
    /// Order: `override_path` (the variable `MC_EFA_LIBFABRIC`) if given, and then nothing else;
    /// a `libfabric.so.1` already in the process; the system's; `/opt/amazon/efa/lib`.
    /// The first success is kept for the life of the process; a failure is tried again next time.
    pub fn get(override_path: Option<&str>) -> Result<&'static Self> {
        static LOADED: OnceLock<Libfabric> = OnceLock::new();
        if let Some(lib) = LOADED.get() {
            return Ok(lib);
        }
        let lib = Self::load(override_path)?;
        Ok(LOADED.get_or_init(|| lib))
    }

    fn load(override_path: Option<&str>) -> Result<Self> {
        let mut tried = Vec::new();
        let handle = match override_path {
            Some(path) => open(path, 0, &mut tried),
            None => open(PLACES[0], libc::RTLD_NOLOAD, &mut Vec::new())
                .or_else(|| PLACES.iter().find_map(|path| open(path, 0, &mut tried))),
        };
        let handle = handle.ok_or_else(|| {
            Error::new(
                Code::Context,
                format!(
                    "libfabric could not be loaded ({}); install it (Debian, Ubuntu: libfabric1; \
                     AWS: the EFA installer) or name it with MC_EFA_LIBFABRIC",
                    tried.join("; ")
                ),
            )
        })?;
        let path = path_of(handle);
        let missing = |name: &str| {
            Error::new(Code::Context, format!("{path} has no symbol {name}: not a libfabric"))
        };
        // SAFETY: each pointer is the named libfabric function, whose C signature is the type given.
        unsafe {
            let getinfo = newest(handle, c"fi_getinfo").ok_or_else(|| missing("fi_getinfo"))?;
            let dupinfo = newest(handle, c"fi_dupinfo").ok_or_else(|| missing("fi_dupinfo"))?;
            let freeinfo = newest(handle, c"fi_freeinfo").ok_or_else(|| missing("fi_freeinfo"))?;
            let fabric = newest(handle, c"fi_fabric").ok_or_else(|| missing("fi_fabric"))?;
            let version_fn = newest(handle, c"fi_version").ok_or_else(|| missing("fi_version"))?;
            let strerror = newest(handle, c"fi_strerror").ok_or_else(|| missing("fi_strerror"))?;
            let library = std::mem::transmute::<*mut c_void, Version>(version_fn)();
            if library < OLDEST_API {
                return Err(Error::new(
                    Code::Context,
                    format!("{path} is libfabric {}; 1.17 or newer is needed", dotted(library)),
                ));
            }
            Ok(Self {
                getinfo: std::mem::transmute::<*mut c_void, GetInfo>(getinfo),
                freeinfo: std::mem::transmute::<*mut c_void, FreeInfo>(freeinfo),
                dupinfo: std::mem::transmute::<*mut c_void, DupInfo>(dupinfo),
                fabric: std::mem::transmute::<*mut c_void, OpenFabric>(fabric),
                strerror: std::mem::transmute::<*mut c_void, StrError>(strerror),
                api: library.min(BINDINGS_API),
                library,
                path,
            })
        }
    }

    /// The library's own version, for instance `1.17`.
    pub fn version(&self) -> String {
        dotted(self.library)
    }

    /// The file it was loaded from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// libfabric's words for an errno of its own; the sign does not matter.
    pub fn strerror(&self, errno: i32) -> String {
        // SAFETY: fi_strerror takes any number and returns a static string.
        let text = unsafe { (self.strerror)(errno.abs()) };
        if text.is_null() {
            return format!("error {errno}");
        }
        // SAFETY: a NUL-terminated static string, see above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    /// The error of a failed libfabric call: what we wanted to do, and libfabric's reason.
    pub(super) fn error(&self, code: Code, what: &str, ret: i64) -> Error {
        let errno = i32::try_from(-ret).unwrap_or(i32::MAX);
        Error::new(code, format!("{what} failed: {} ({errno})", self.strerror(errno)))
    }
}

fn dotted(version: u32) -> String {
    format!("{}.{}", version >> 16, version & 0xffff)
}

fn open(path: &str, extra: c_int, tried: &mut Vec<String>) -> Option<*mut c_void> {
    let c_path = CString::new(path).ok()?;
    let signals = Signals::save();
    // SAFETY: a NUL-terminated path; libfabric's initialisers may run, which is what loading means.
    let handle =
        unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL | extra) };
    drop(signals);
    if !handle.is_null() {
        return Some(handle);
    }
    // SAFETY: dlerror returns NULL or a string valid until this thread's next dl call.
    let reason = unsafe { libc::dlerror() };
    tried.push(if reason.is_null() {
        path.to_owned()
    } else {
        // SAFETY: as above.
        unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned()
    });
    None
}

/// The process's signal handlers, put back when this is dropped. Debian's libfabric brings psm and
/// psm2, whose initialisers take over INT, TERM, SEGV and others: not theirs to take from our host.
struct Signals(Vec<(c_int, libc::sigaction)>);

impl Signals {
    fn save() -> Self {
        let current = |signal: c_int| {
            // SAFETY: zero is a valid sigaction to be overwritten; only reads the current one.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let ret = libc::sigaction(signal, std::ptr::null(), &raw mut action);
                (ret == 0).then_some((signal, action))
            }
        };
        Self((1..32).filter_map(current).collect())
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, action) in &self.0 {
            // SAFETY: puts back what the kernel gave us. KILL and STOP refuse, which is right.
            unsafe { libc::sigaction(*signal, action, std::ptr::null_mut()) };
        }
    }
}

/// The newest generation of `name` that the library has and our bindings know.
fn newest(handle: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    let versioned = GENERATIONS.iter().map(|generation| {
        // SAFETY: a live handle and two NUL-terminated strings.
        unsafe { libc::dlvsym(handle, name.as_ptr(), generation.as_ptr()) }
    });
    // What never changed (fi_version, fi_strerror, fi_fabric) has one old version only.
    // SAFETY: as above.
    let plain = std::iter::once_with(|| unsafe { libc::dlsym(handle, name.as_ptr()) });
    versioned.chain(plain).find(|symbol| !symbol.is_null())
}

fn path_of(handle: *mut c_void) -> String {
    let mut map: *mut c_void = std::ptr::null_mut();
    // SAFETY: RTLD_DI_LINKMAP writes one pointer to a `struct link_map`, which lives as long as the
    // handle; its second field is `char *l_name`.
    unsafe {
        if libc::dlinfo(handle, libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) != 0 || map.is_null()
        {
            return "libfabric.so.1".to_owned();
        }
        let name = *map.cast::<*const c_char>().add(1);
        CStr::from_ptr(name).to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_and_negotiates() {
        let lib = Libfabric::get(None).expect("libfabric");
        assert!(lib.api >= OLDEST_API && lib.api <= BINDINGS_API && lib.api <= lib.library);
        assert!(lib.path().contains("libfabric.so.1"), "{}", lib.path());
        assert_eq!(lib.strerror(-11), lib.strerror(11));
    }

    #[test]
    fn signal_handlers_stay_the_hosts() {
        let caught = || {
            let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
            status.lines().find(|line| line.starts_with("SigCgt")).map(str::to_owned)
        };
        let before = caught();
        Libfabric::load(None).expect("libfabric");
        assert_eq!(caught(), before);
    }

    #[test]
    fn a_wrong_path_names_itself_and_the_remedy() {
        let text = Libfabric::load(Some("/nowhere/libfabric.so.1")).err().expect("refused").text;
        assert!(text.contains("/nowhere/libfabric.so.1") && text.contains("MC_EFA_LIBFABRIC"));
        let text = Libfabric::load(Some("libc.so.6")).err().expect("refused").text;
        assert!(text.contains("not a libfabric"), "{text}");
    }
}
