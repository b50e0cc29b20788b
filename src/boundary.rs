//! What the functions of a C door do at the boundary: catch panics, turn pointers into Rust values or refuse
//! them.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Code, Error, Result};

/// Runs `f`. A panic is a bug of ours: it becomes [`Code::Internal`].
pub fn caught<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        log::error!("internal error: {what}");
        Err(Error::new(Code::Internal, format!("internal error, please report it: {what}")))
    })
}

fn null(name: &str) -> Error {
    Error::invalid(format!("{name} is NULL"))
}

/// A C string that must be there.
///
/// # Safety
/// `text` is NULL or a NUL-terminated string that lives for `'a`.
pub unsafe fn string<'a>(text: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: passed on.
    unsafe { optional_string(text, name) }?.ok_or_else(|| null(name))
}

/// A C string that may be NULL.
///
/// # Safety
/// As [`string`].
pub unsafe fn optional_string<'a>(text: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: not NULL, so NUL-terminated, as the caller of the exported function promised.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| Error::invalid(format!("{name} is not UTF-8")))
}

/// An array; NULL is allowed when it is empty.
///
/// # Safety
/// `items` is NULL or points to `count` valid items that live for `'a`.
pub unsafe fn array<'a, T>(items: *const T, count: usize, name: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if items.is_null() {
        return Err(null(name));
    }
    if !items.is_aligned() || count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Error::invalid(format!("{name}: misaligned, or {count} items are too many")));
    }
    // SAFETY: not NULL, aligned, and of a possible size; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(items, count) })
}

/// Writes an out-parameter; does nothing else, so call it last.
///
/// # Safety
/// `out` is NULL or points to a `T` that may be written.
pub unsafe fn put<T>(out: *mut T, value: T, name: &str) -> Result<()> {
    check_out(out, name)?;
    // SAFETY: not NULL and aligned; the rest is the caller's promise. The old value is plain data.
    unsafe { out.write(value) };
    Ok(())
}

/// Refuses an out-parameter that [`put`] would refuse, before anything is done.
pub fn check_out<T>(out: *mut T, name: &str) -> Result<()> {
    if out.is_null() {
        return Err(null(name));
    }
    if !out.is_aligned() {
        return Err(Error::invalid(format!("{name} is misaligned")));
    }
    Ok(())
}

/// Reads a structure that begins with its size, as the caller's header knew it: fields that it did
/// not have are zero; fields that we do not have must be.
///
/// # Safety
/// `from` is NULL or points to a structure that begins with a `size_t` of its size and has as many
/// readable bytes. All-zero must be a valid `T`, and so must any bytes its C type can have.
pub unsafe fn sized<T>(from: *const T, least: usize, name: &str) -> Result<T> {
    if from.is_null() {
        return Err(null(name));
    }
    if !from.is_aligned() {
        return Err(Error::invalid(format!("{name} is misaligned")));
    }
    // SAFETY: the structure begins with its size.
    let size = unsafe { from.cast::<usize>().read() };
    // A size that ends inside a field is no structure that ever was.
    if size < least || size > 64 * 1024 || size % align_of::<T>() != 0 {
        return Err(Error::invalid(format!(
            "{name}.size is {size}: set it to sizeof of the structure"
        )));
    }
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes are readable, as the caller promised.
    let tail = unsafe { std::slice::from_raw_parts(from.cast::<u8>().add(known), size - known) };
    if tail.iter().any(|&byte| byte != 0) {
        return Err(Error::invalid(format!(
            "{name} uses fields that this library does not know: it is older than the header"
        )));
    }
    // SAFETY: all-zero is valid, and `known` bytes fit in both.
    unsafe {
        let mut value: T = std::mem::zeroed();
        std::ptr::copy_nonoverlapping(from.cast::<u8>(), (&raw mut value).cast(), known);
        Ok(value)
    }
}
