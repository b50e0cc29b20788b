//! File functions of the C library that see the emulated `/sys`.
//!
//! Only absolute paths are looked at, and what has been opened (a directory's file descriptor, say)
//! is what it is. The C library's own calls (`glob`, `ftw`) are out of reach, as are system calls
//! made without it.
//!
//! All of this runs in every program, before `main`, in forked children and below `malloc`: a path
//! that is not of one of the [`PLACES`] costs a look at its first bytes, and none but the first
//! that is makes us allocate or lock. Nothing here can panic.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{DIR, FILE, mode_t, size_t, ssize_t};
use softefa_core::sysfs::{PLACES, PathBuffer, overlay, underlay};

use crate::world::world_if_made;

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!(
    "libsoftefa.so stands in for variadic functions: it is for Linux on x86-64 and aarch64"
);

/// The version of the first symbols of the C library.
const FIRST_VERSION: &CStr =
    if cfg!(target_arch = "x86_64") { c"GLIBC_2.2.5" } else { c"GLIBC_2.17" };

static ROOT: OnceLock<Box<[u8]>> = OnceLock::new();

/// From now on the tree at `root` lies over `/sys`. The first call counts.
pub fn set_root(root: &Path) {
    // As realpath will name it, whose results are to be recognised.
    let root = root.canonicalize().unwrap_or_else(|_| root.to_path_buf());
    let root = root.as_os_str().as_bytes();
    // A shorter one would be replaced by a longer text, in the caller's memory.
    if root.len() >= SYS.len() {
        let _ = ROOT.set(root.into());
    }
}

const SYS: &[u8] = b"/sys";

/// Does a C string begin with `prefix`?
///
/// # Safety
/// `text` is a C string.
unsafe fn begins_with(text: *const c_char, prefix: &[u8]) -> bool {
    // SAFETY: all bytes before the one that is read are the prefix's, so none is the NUL.
    prefix.iter().enumerate().all(|(i, byte)| unsafe { *text.add(i).cast::<u8>() } == *byte)
}

/// The path to use instead of `path`: often the same pointer, else one into `buffer`.
///
/// # Safety
/// `path` is null or a C string.
unsafe fn redirected(path: *const c_char, buffer: &mut MaybeUninit<PathBuffer>) -> *const c_char {
    // SAFETY: by this function's contract, past the check for null.
    let ours = !path.is_null() && PLACES.iter().any(|place| unsafe { begins_with(path, place) });
    if !ours {
        return path;
    }
    // Our own looks for files must not be seen: functions that succeed leave errno alone.
    // SAFETY: the thread's own.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    // The first look there makes this process one of the cluster, which sets the root.
    let root = world_if_made().and_then(|_| ROOT.get());
    // SAFETY: as for begins_with.
    let text = unsafe { CStr::from_ptr(path) };
    let buffer = buffer.write([0; libc::PATH_MAX as usize]);
    let instead = root.and_then(|root| overlay(root, text.to_bytes(), buffer));
    // SAFETY: as above.
    unsafe { *errno = before };
    instead.map_or(path, CStr::as_ptr)
}

/// Makes a path below the root one below `/sys`. The length it has then.
fn restored(text: &mut [u8]) -> usize {
    let rest = ROOT.get().and_then(|root| underlay(root, text)).map(<[u8]>::len);
    let length = text.len();
    let Some(rest) = rest else { return length };
    text.copy_within(length - rest.., SYS.len());
    text[..SYS.len()].copy_from_slice(SYS);
    SYS.len() + rest
}

/// [`restored`] of a C string, which is returned.
///
/// # Safety
/// `text` is null or a C string that may be written to.
unsafe fn restored_string(text: *mut c_char) -> *mut c_char {
    if !text.is_null() {
        // SAFETY: by this function's contract.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(text.cast::<u8>(), libc::strlen(text)) };
        let length = restored(bytes);
        // SAFETY: not beyond the NUL that was there.
        unsafe { *text.add(length) = 0 };
    }
    text
}

/// [`restored`] of the result of a `readlink` into `buffer`, which has `size` bytes.
///
/// # Safety
/// `result` bytes are there, if it is not negative.
unsafe fn restored_link(buffer: *mut c_char, size: size_t, result: ssize_t) -> ssize_t {
    match usize::try_from(result) {
        // One that fills the buffer may be cut off, and must go on to look so.
        Ok(length) if length < size => {
            // SAFETY: by this function's contract.
            let text = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
            restored(text) as ssize_t
        }
        _ => result,
    }
}

/// The C library's function of that name, null if it has none. `cache` remembers it.
fn real(cache: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = cache.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: both are strings, and we are a library that has a next one.
    let found = unsafe {
        let found = libc::dlsym(libc::RTLD_NEXT, name.as_ptr());
        // Those that only old programs call are not found without a version.
        if found.is_null() {
            libc::dlvsym(libc::RTLD_NEXT, name.as_ptr(), FIRST_VERSION.as_ptr())
        } else {
            found
        }
    };
    cache.store(found, Ordering::Relaxed);
    found
}

/// Calls the C library's function `$name`; where there is none, is `$failed` with ENOSYS.
macro_rules! call_real {
    ($name:ident as $type:ty, ($($argument:expr),*), $failed:expr) => {{
        static REAL: AtomicPtr<c_void> = AtomicPtr::new(null_mut());
        const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes())
        {
            Ok(name) => name,
            Err(_) => unreachable!(),
        };
        // SAFETY: a function of that name has that type, or is null.
        match unsafe { std::mem::transmute::<*mut c_void, Option<$type>>(real(&REAL, NAME)) } {
            // SAFETY: the arguments are the caller's, or as good.
            Some(real) => unsafe { real($($argument),*) },
            None => {
                // SAFETY: the thread's own.
                unsafe { *libc::__errno_location() = libc::ENOSYS };
                $failed
            }
        }
    }};
}

/// Defines C functions that take a path, which is redirected. The path stands between semicolons:
/// `fn name(before; path; after) -> result, result of a failure;`
macro_rules! interpose {
    ($(fn $name:ident($($pre:ident: $pre_type:ty),*; $path:ident; $($post:ident: $post_type:ty),*)
        -> $result:ty, $failed:expr;)*) => {$(
        // SAFETY: as the C library's function of that name, which it stands before.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($pre: $pre_type,)* $path: *const c_char $(, $post: $post_type)*
        ) -> $result {
            let mut buffer = MaybeUninit::uninit();
            // SAFETY: the caller passes what the C library's function takes.
            let path = unsafe { redirected($path, &mut buffer) };
            type Real = unsafe extern "C" fn($($pre_type,)* *const c_char $(, $post_type)*) -> $result;
            call_real!($name as Real, ($($pre,)* path $(, $post)*), $failed)
        }
    )*};
}

/// As [`interpose`], for the functions that take a mode only if a flag says that there is one.
///
/// Stable Rust has no variadic definitions. On x86-64 and aarch64 Linux a variadic argument is
/// where a named one would be, in a register: where the caller passed none, the mode is whatever
/// the register has, and the real function, which gets the same flags, does not look at it.
macro_rules! interpose_open {
    ($(fn $name:ident($($pre:ident: $pre_type:ty)?);)*) => {$(
        // SAFETY: as the C library's function of that name, which it stands before.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($pre: $pre_type,)? path: *const c_char, flags: c_int, mode: mode_t
        ) -> c_int {
            let mut buffer = MaybeUninit::uninit();
            // SAFETY: the caller passes what the C library's function takes.
            let path = unsafe { redirected(path, &mut buffer) };
            type Real = unsafe extern "C" fn($($pre_type,)? *const c_char, c_int, ...) -> c_int;
            call_real!($name as Real, ($($pre,)? path, flags, mode), -1)
        }
    )*};
}

interpose_open! {
    fn open();
    fn open64();
    fn openat(dir: c_int);
    fn openat64(dir: c_int);
}

type Filter = Option<unsafe extern "C" fn(*const libc::dirent) -> c_int>;
type Compare =
    Option<unsafe extern "C" fn(*mut *const libc::dirent, *mut *const libc::dirent) -> c_int>;
type Entries = *mut *mut *mut libc::dirent;
type Filter64 = Option<unsafe extern "C" fn(*const libc::dirent64) -> c_int>;
type Compare64 =
    Option<unsafe extern "C" fn(*mut *const libc::dirent64, *mut *const libc::dirent64) -> c_int>;
type Entries64 = *mut *mut *mut libc::dirent64;

interpose! {
    fn __open_2(; path; flags: c_int) -> c_int, -1;
    fn __open64_2(; path; flags: c_int) -> c_int, -1;
    fn __openat_2(dir: c_int; path; flags: c_int) -> c_int, -1;
    fn __openat64_2(dir: c_int; path; flags: c_int) -> c_int, -1;
    fn fopen(; path; mode: *const c_char) -> *mut FILE, null_mut();
    fn fopen64(; path; mode: *const c_char) -> *mut FILE, null_mut();
    fn freopen(; path; mode: *const c_char, stream: *mut FILE) -> *mut FILE, null_mut();
    fn freopen64(; path; mode: *const c_char, stream: *mut FILE) -> *mut FILE, null_mut();
    fn opendir(; path; ) -> *mut DIR, null_mut();
    fn scandir(; path; list: Entries, filter: Filter, compare: Compare) -> c_int, -1;
    fn scandir64(; path; list: Entries64, filter: Filter64, compare: Compare64) -> c_int, -1;

    fn stat(; path; status: *mut libc::stat) -> c_int, -1;
    fn stat64(; path; status: *mut libc::stat64) -> c_int, -1;
    fn lstat(; path; status: *mut libc::stat) -> c_int, -1;
    fn lstat64(; path; status: *mut libc::stat64) -> c_int, -1;
    fn fstatat(dir: c_int; path; status: *mut libc::stat, flags: c_int) -> c_int, -1;
    fn fstatat64(dir: c_int; path; status: *mut libc::stat64, flags: c_int) -> c_int, -1;
    fn statx(dir: c_int; path; flags: c_int, mask: c_uint, status: *mut libc::statx) -> c_int, -1;
    fn __xstat(version: c_int; path; status: *mut libc::stat) -> c_int, -1;
    fn __xstat64(version: c_int; path; status: *mut libc::stat64) -> c_int, -1;
    fn __lxstat(version: c_int; path; status: *mut libc::stat) -> c_int, -1;
    fn __lxstat64(version: c_int; path; status: *mut libc::stat64) -> c_int, -1;
    fn __fxstatat(version: c_int, dir: c_int; path; status: *mut libc::stat, flags: c_int)
        -> c_int, -1;
    fn __fxstatat64(version: c_int, dir: c_int; path; status: *mut libc::stat64, flags: c_int)
        -> c_int, -1;

    fn access(; path; mode: c_int) -> c_int, -1;
    fn eaccess(; path; mode: c_int) -> c_int, -1;
    fn euidaccess(; path; mode: c_int) -> c_int, -1;
    fn faccessat(dir: c_int; path; mode: c_int, flags: c_int) -> c_int, -1;
}

/// Defines C functions as [`interpose`] does, whose result is a path, which is restored.
macro_rules! interpose_resolving {
    ($(fn $name:ident($($post:ident: $post_type:ty),*);)*) => {$(
        // SAFETY: as the C library's function of that name, which it stands before.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(path: *const c_char $(, $post: $post_type)*) -> *mut c_char {
            let mut buffer = MaybeUninit::uninit();
            // SAFETY: the caller passes what the C library's function takes.
            let path = unsafe { redirected(path, &mut buffer) };
            type Real = unsafe extern "C" fn(*const c_char $(, $post_type)*) -> *mut c_char;
            let resolved = call_real!($name as Real, (path $(, $post)*), null_mut());
            // SAFETY: the function's result, the caller's to write to.
            unsafe { restored_string(resolved) }
        }
    )*};
}

interpose_resolving! {
    fn realpath(resolved: *mut c_char);
    fn __realpath_chk(resolved: *mut c_char, length: size_t);
    fn canonicalize_file_name();
}

/// Defines C functions as [`interpose`] does, which write a path to a buffer, where it is restored.
/// The tree's links are relative; those of `/proc/self/fd` are not.
macro_rules! interpose_readlink {
    ($(fn $name:ident($($pre:ident: $pre_type:ty)?; $($post:ident: $post_type:ty)?);)*) => {$(
        // SAFETY: as the C library's function of that name, which it stands before.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            $($pre: $pre_type,)? path: *const c_char, text: *mut c_char, size: size_t
            $(, $post: $post_type)?
        ) -> ssize_t {
            let mut buffer = MaybeUninit::uninit();
            // SAFETY: the caller passes what the C library's function takes.
            let path = unsafe { redirected(path, &mut buffer) };
            type Real = unsafe extern "C" fn(
                $($pre_type,)? *const c_char, *mut c_char, size_t $(, $post_type)?
            ) -> ssize_t;
            let length = call_real!($name as Real, ($($pre,)? path, text, size $(, $post)?), -1);
            // SAFETY: what the function has written.
            unsafe { restored_link(text, size, length) }
        }
    )*};
}

interpose_readlink! {
    fn readlink(;);
    fn readlinkat(dir: c_int;);
    fn __readlink_chk(; space: size_t);
    fn __readlinkat_chk(dir: c_int; space: size_t);
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs;
    use std::path::PathBuf;
    use std::ptr::null;

    use softefa_core::profile::Profile;
    use softefa_core::sysfs::create;

    use super::*;

    fn errno() -> c_int {
        // SAFETY: the thread's own.
        unsafe { *libc::__errno_location() }
    }

    fn names(path: &Path) -> Vec<PathBuf> {
        let mut names: Vec<_> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into()).collect();
        names.sort();
        names
    }

    /// The functions are this program's own, so what the standard library calls are they. One test,
    /// for a process has one root.
    #[test]
    fn this_program_sees_the_tree_as_sys() {
        let dir = std::env::temp_dir().join(format!("softefa-redirect-{}", std::process::id()));
        create(&dir, &Profile::named("p5").unwrap(), 0).unwrap();
        // SAFETY: the other tests ask for variables through the standard library, which locks.
        unsafe { std::env::set_var("SOFTEFA_DIR", dir.join("cluster")) };
        let before = names(Path::new("/sys/class"));
        set_root(&dir);
        let root = Path::new(std::str::from_utf8(ROOT.get().unwrap()).unwrap());

        let nics = names(Path::new("/sys/class/infiniband"));
        assert_eq!(nics, names(&root.join("class/infiniband")));
        let nic = Path::new("/sys/class/infiniband").join(&nics[0]);
        assert!(fs::symlink_metadata(&nic).unwrap().is_symlink());
        let device = nic.join("../..").canonicalize().unwrap();
        assert!(device.starts_with("/sys/devices"), "{}", device.display());
        assert_eq!(fs::read_to_string(device.join("vendor")).unwrap(), "0x1d0f\n");
        assert!(fs::read_link(nic.join("device")).unwrap().is_relative());
        let file = fs::File::open(device.join("vendor")).unwrap();
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        assert_eq!(fs::read_link(link).unwrap(), device.join("vendor"));

        // The rest stays real.
        for name in before {
            assert!(Path::new("/sys/class").join(&name).exists(), "{}", name.display());
        }
        assert!(!Path::new("/dev/infiniband/uverbs9999").exists());
        let kind = fs::metadata("/dev/infiniband/uverbs0").unwrap().file_type();
        assert!(std::os::unix::fs::FileTypeExt::is_char_device(&kind));

        // Errors and null are the C library's affair; a look for a file in vain leaves no trace.
        let none = CString::new("/sys/bus/pci/none").unwrap();
        // SAFETY: C strings, null, and room for the results.
        unsafe {
            let mut status = MaybeUninit::uninit();
            *libc::__errno_location() = 77;
            let path = redirected(none.as_ptr(), &mut MaybeUninit::uninit());
            assert_eq!((path, errno()), (none.as_ptr(), 77));
            assert_eq!(
                (libc::stat(none.as_ptr(), status.as_mut_ptr()), errno()),
                (-1, libc::ENOENT)
            );
            assert_eq!((libc::stat(null(), status.as_mut_ptr()), errno()), (-1, libc::EFAULT));
            assert_eq!((libc::open(null(), libc::O_RDONLY), errno()), (-1, libc::EFAULT));
            assert!(libc::realpath(null(), null_mut()).is_null() && errno() == libc::EINVAL);
        }

        // A result that fills its buffer is not shortened: it may be the half of one.
        let link = dir.join("link");
        std::os::unix::fs::symlink(root.join("class"), &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/sys/class"));
        let link = CString::new(link.as_os_str().as_bytes()).unwrap();
        let root = root.as_os_str().as_bytes();
        let mut text = vec![0_u8; root.len() + "/cl".len()];
        // SAFETY: a C string and the room that is told.
        let length = unsafe { libc::readlink(link.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
        assert_eq!((length, &text), (text.len() as ssize_t, &[root, b"/cl"].concat()));

        fs::remove_dir_all(&dir).unwrap();
    }
}
