//! `fi_getinfo`: asking which endpoints there are.

use std::ffi::{CStr, CString};
use std::ptr::NonNull;

use parking_lot::Mutex;

use super::bindings as ffi;
use super::load::{Libfabric, OLDEST_HMEM, version};
use super::objects::MAX_NAME;
use crate::error::{Code, Error, Result};

/// What to ask for.
#[derive(Clone, Debug, Default)]
pub struct Query<'a> {
    /// libfabric's provider name, for instance `efa` or `tcp;ofi_rxm`.
    pub provider: &'a str,
    /// Fabric name; the `efa` provider lists `efa-direct` first if it is not set.
    pub fabric: Option<&'a str>,
    /// Ask for device memory support (`FI_HMEM`), from libfabric 1.18 on. If the process's first query does not, libfabric
    /// is kept from the GPUs for good, unless the variable `FI_HMEM` is set.
    pub hmem: bool,
}

/// One endpoint kind on one domain, as `fi_getinfo` describes it.
pub struct Info {
    pub(super) raw: NonNull<ffi::fi_info>,
    pub(super) lib: &'static Libfabric,
}

// SAFETY: an owned C structure without thread affinity; only `&mut self` changes it.
unsafe impl Send for Info {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Info {}

impl Clone for Info {
    fn clone(&self) -> Self {
        // SAFETY: `raw` is whole; fi_dupinfo copies it deeply.
        let copy = NonNull::new(unsafe { (self.lib.dupinfo)(self.raw.as_ptr()) });
        Self { raw: copy.expect("fi_dupinfo: out of memory"), lib: self.lib }
    }
}

impl Drop for Info {
    fn drop(&mut self) {
        // SAFETY: `raw` came from fi_dupinfo and is freed once.
        unsafe { (self.lib.freeinfo)(self.raw.as_ptr()) }
    }
}

const CAPS: u64 = (ffi::FI_MSG
    | ffi::FI_RMA
    | ffi::FI_READ
    | ffi::FI_WRITE
    | ffi::FI_REMOTE_READ
    | ffi::FI_REMOTE_WRITE) as u64;
const MODE: u64 = ffi::FI_CONTEXT | ffi::FI_CONTEXT2;
const MR_MODE: u32 = ffi::FI_MR_LOCAL
    | ffi::FI_MR_VIRT_ADDR
    | ffi::FI_MR_ALLOCATED
    | ffi::FI_MR_PROV_KEY
    | ffi::FI_MR_ENDPOINT;

impl Info {
    /// All reliable-datagram RMA endpoints that match. An empty list if there are none.
    pub fn query(lib: &'static Libfabric, query: &Query) -> Result<Vec<Self>> {
        let hints = Self::hints(lib, query)?;
        // 1.17 has been seen to crash in two calls at once. Whether there was one:
        static ONE_AT_A_TIME: Mutex<bool> = Mutex::new(false);
        let mut asked = ONE_AT_A_TIME.lock();
        let hides_gpus = !std::mem::replace(&mut *asked, true)
            && !wants_hmem(lib, query)
            && std::env::var_os("FI_HMEM").is_none();
        if hides_gpus {
            // libfabric looks at it in the first call, and would open a context on a GPU.
            // SAFETY: changing the environment races with C code that reads it by pointer. glibc keeps replaced
            // strings, and this happens once, when a transport is installed.
            unsafe { std::env::set_var("FI_HMEM", "system") };
        }
        let mut list = std::ptr::null_mut();
        // SAFETY: `hints` is a whole fi_info made by this library; node and service may be NULL.
        let ret = unsafe {
            (lib.getinfo)(
                lib.api,
                std::ptr::null(),
                std::ptr::null(),
                0,
                hints.raw.as_ptr(),
                &raw mut list,
            )
        };
        if hides_gpus {
            // Programs that are started from here may want it otherwise.
            // SAFETY: as above.
            unsafe { std::env::remove_var("FI_HMEM") };
        }
        if ret == -(ffi::FI_ENODATA as i32) {
            return Ok(Vec::new());
        }
        if ret != 0 {
            return Err(lib.error(Code::DeviceNotFound, "fi_getinfo", ret.into()));
        }
        let mut infos = Vec::new();
        let mut next = list;
        while let Some(raw) = NonNull::new(next) {
            // SAFETY: list elements are valid until fi_freeinfo(list) below. fi_dupinfo copies one
            // element, without its `next`.
            unsafe {
                next = raw.as_ref().next;
                if let Some(copy) = NonNull::new((lib.dupinfo)(raw.as_ptr())) {
                    infos.push(Self { raw: copy, lib });
                }
            }
        }
        // SAFETY: `list` came from fi_getinfo and nothing points into it any more.
        unsafe { (lib.freeinfo)(list) };
        Ok(infos)
    }

    fn hints(lib: &'static Libfabric, query: &Query) -> Result<Self> {
        // SAFETY: fi_dupinfo(NULL) allocates an empty fi_info with all its attribute structures, in
        // the sizes of the library's own version.
        let raw = NonNull::new(unsafe { (lib.dupinfo)(std::ptr::null()) })
            .ok_or_else(|| Error::new(Code::Memory, "fi_allocinfo: out of memory"))?;
        let hints = Self { raw, lib };
        // SAFETY: we own the structure; every field written exists since 1.17. Strings are from
        // malloc because fi_freeinfo frees them.
        unsafe {
            let info = raw.as_ptr();
            let hmem = wants_hmem(lib, query);
            (*info).caps = CAPS | if hmem { ffi::FI_HMEM } else { 0 };
            (*info).mode = MODE;
            (*(*info).ep_attr).type_ = ffi::FI_EP_RDM;
            let domain = (*info).domain_attr;
            (*domain).mr_mode = (MR_MODE | if hmem { ffi::FI_MR_HMEM } else { 0 }) as i32;
            (*domain).threading = ffi::FI_THREAD_DOMAIN;
            (*domain).av_type = ffi::FI_AV_TABLE;
            (*domain).resource_mgmt = ffi::FI_RM_ENABLED;
            (*(*info).fabric_attr).prov_name = c_string(query.provider)?;
            if let Some(fabric) = query.fabric {
                (*(*info).fabric_attr).name = c_string(fabric)?;
            }
        }
        Ok(hints)
    }

    fn domain_attr(&self) -> &ffi::fi_domain_attr {
        // SAFETY: fi_getinfo and fi_dupinfo always fill the attribute pointers.
        unsafe { &*self.raw.as_ref().domain_attr }
    }

    fn tx_attr(&self) -> &ffi::fi_tx_attr {
        // SAFETY: as in domain_attr.
        unsafe { &*self.raw.as_ref().tx_attr }
    }

    fn fabric_attr(&self) -> &ffi::fi_fabric_attr {
        // SAFETY: as in domain_attr.
        unsafe { &*self.raw.as_ref().fabric_attr }
    }

    /// Provider name, for instance `efa`.
    pub fn provider(&self) -> String {
        string(self.fabric_attr().prov_name)
    }

    /// Fabric name, for instance `efa` or `efa-direct`.
    pub fn fabric(&self) -> String {
        string(self.fabric_attr().name)
    }

    /// Domain name, for instance `rdmap0s31-rdm` or `eth0`.
    pub fn domain(&self) -> String {
        string(self.domain_attr().name)
    }

    /// Transmit depth: how many operations the endpoint takes before it says "again".
    pub fn tx_depth(&self) -> usize {
        self.tx_attr().size
    }

    /// Receive buffers that an endpoint keeps posted.
    pub fn receives(&self) -> usize {
        // SAFETY: as in domain_attr.
        unsafe { (*self.raw.as_ref().rx_attr).size }
    }

    /// Whether RMA may be the device's own, so that peers' operations need no receive buffers here: an
    /// `efa` provider that was asked for API 1.18 or later.
    pub fn device_rma(&self) -> bool {
        self.lib.api >= version(1, 18) && self.provider() == "efa"
    }

    /// Keeps at most so many receive buffers posted.
    pub fn limit_receives(&mut self, most: usize) {
        let size = self.receives().min(most);
        // SAFETY: as in domain_attr, and nobody else sees it.
        unsafe { (*(*self.raw.as_ptr()).rx_attr).size = size };
    }

    /// Longest single operation in bytes.
    pub fn max_message(&self) -> u64 {
        // SAFETY: as in domain_attr.
        unsafe { (*self.raw.as_ref().ep_attr).max_msg_size as u64 }
    }

    /// Remote addresses are the target's virtual addresses; otherwise offsets into the region.
    pub fn virtual_addresses(&self) -> bool {
        self.has_mr_mode(ffi::FI_MR_VIRT_ADDR)
    }

    /// The provider chooses region keys; otherwise we do.
    pub fn provider_keys(&self) -> bool {
        self.has_mr_mode(ffi::FI_MR_PROV_KEY)
    }

    /// Local buffers need a descriptor of their registration.
    pub fn local_descriptors(&self) -> bool {
        self.has_mr_mode(ffi::FI_MR_LOCAL)
    }

    /// Regions are bound to an endpoint.
    pub(super) fn endpoint_regions(&self) -> bool {
        self.has_mr_mode(ffi::FI_MR_ENDPOINT)
    }

    /// Device memory can be registered, and the device itself reads and writes it.
    pub fn device_memory(&self) -> bool {
        self.no_device_memory().is_none()
    }

    /// Why device memory cannot be registered, if so. Software providers copy it by the CPU, in the middle of a poll and
    /// in whatever context is there, and `shm` says `FI_HMEM` even where libfabric has no CUDA: theirs is of no use.
    pub fn no_device_memory(&self) -> Option<String> {
        let provider = self.provider();
        if provider != "efa" {
            return Some(format!("provider {provider} takes host memory only"));
        }
        if self.lib.api < OLDEST_HMEM {
            return Some(format!(
                "libfabric {} cannot be kept from copying GPU memory by the CPU, as 1.18 and newer can",
                self.lib.version()
            ));
        }
        // SAFETY: as in domain_attr.
        (unsafe { self.raw.as_ref().caps & ffi::FI_HMEM == 0 }).then(|| {
            "libfabric has no CUDA here: it was built without, or finds no libcudart.so, or FI_HMEM says so, as \
             it does if this process used no GPU yet when libfabric was first used"
                .to_owned()
        })
    }

    /// Device memory can be registered by a dmabuf.
    pub fn takes_dmabuf(&self) -> bool {
        self.device_memory() && self.lib.api >= version(1, 20)
    }

    /// Bytes of a region key that the provider can take.
    pub fn key_bytes(&self) -> usize {
        self.domain_attr().mr_key_size
    }

    /// The endpoint's addresses are IP ones.
    pub fn speaks_ip(&self) -> bool {
        matches!(self.address_form(), AddressForm::Ipv4 | AddressForm::Ipv6)
    }

    /// The endpoint speaks IPv6 addresses.
    pub fn is_ipv6(&self) -> bool {
        self.address_form() == AddressForm::Ipv6
    }

    /// What the endpoint's addresses, and so its peers', look like.
    pub(super) fn address_form(&self) -> AddressForm {
        // SAFETY: as in domain_attr.
        match unsafe { self.raw.as_ref().addr_format } {
            ffi::FI_SOCKADDR_IN => AddressForm::Ipv4,
            ffi::FI_SOCKADDR_IN6 => AddressForm::Ipv6,
            ffi::FI_ADDR_EFA => AddressForm::Efa,
            ffi::FI_ADDR_STR => AddressForm::Text,
            _ => AddressForm::Other,
        }
    }

    fn has_mr_mode(&self, bit: u32) -> bool {
        self.domain_attr().mr_mode as u32 & bit != 0
    }
}

fn wants_hmem(lib: &Libfabric, query: &Query) -> bool {
    query.hmem && lib.api >= OLDEST_HMEM
}

/// What a provider's endpoint addresses look like. Providers believe what they are handed: `tcp` takes
/// the length from the family, `shm` reads up to the NUL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AddressForm {
    /// `struct sockaddr_in`.
    Ipv4,
    /// `struct sockaddr_in6`.
    Ipv6,
    /// `struct efa_ep_addr`.
    Efa,
    /// Text that ends with its only NUL.
    Text,
    /// One that is not known here.
    Other,
}

impl AddressForm {
    /// Whether `address` is of this form; what is wrong with it.
    pub fn check(self, address: &[u8]) -> Result<(), String> {
        let (right, wanted) = match self {
            Self::Ipv4 => (16, Some(libc::AF_INET)),
            Self::Ipv6 => (28, Some(libc::AF_INET6)),
            // GID, queue pair, key, padding, and a pointer that means something to its owner only.
            Self::Efa => (32, None),
            Self::Text | Self::Other => (address.len().clamp(1, MAX_NAME), None),
        };
        if address.len() != right {
            return Err(format!("it has {} bytes, not {right}", address.len()));
        }
        let ends = address.iter().position(|&byte| byte == 0);
        if self == Self::Text && !matches!(ends, Some(1..) if ends == Some(right - 1)) {
            return Err("it is not a text with a NUL at its end".into());
        }
        let family = i32::from(u16::from_ne_bytes([address[0], *address.get(1).unwrap_or(&0)]));
        match wanted {
            Some(wanted) if family != wanted => {
                Err(format!("its family is {family}, not {wanted}"))
            }
            _ => Ok(()),
        }
    }
}

fn c_string(text: &str) -> Result<*mut std::ffi::c_char> {
    let text =
        CString::new(text).map_err(|_| Error::invalid(format!("{text:?} has a NUL byte in it")))?;
    // SAFETY: a NUL-terminated string; the copy is owned by the fi_info it goes into.
    Ok(unsafe { libc::strdup(text.as_ptr()) })
}

fn string(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: libfabric's names are NUL-terminated and live as long as their fi_info.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_address_has_the_providers_form() {
        let ip = |family: libc::c_int, length| {
            let mut address = vec![9; length];
            address[..2].copy_from_slice(&(family as u16).to_ne_bytes());
            address
        };
        let (v4, v6) = (ip(libc::AF_INET, 16), ip(libc::AF_INET6, 28));
        for (form, address, taken) in [
            (AddressForm::Ipv4, &v4[..], true),
            (AddressForm::Ipv4, &v4[..15], false),
            (AddressForm::Ipv4, &v6[..16], false),
            (AddressForm::Ipv4, &v6, false),
            (AddressForm::Ipv6, &v6, true),
            (AddressForm::Ipv6, &v4, false),
            (AddressForm::Ipv6, &ip(libc::AF_INET, 28), false),
            (AddressForm::Efa, &[1; 32], true),
            (AddressForm::Efa, &[1; 31], false),
            (AddressForm::Efa, &[1; 33], false),
            (AddressForm::Efa, &[], false),
            (AddressForm::Text, b"fi_shm://1\0", true),
            (AddressForm::Text, b"fi_shm://1", false),
            (AddressForm::Text, b"fi_shm://1\0x\0", false),
            (AddressForm::Text, b"\0", false),
            (AddressForm::Text, b"", false),
            (AddressForm::Text, &[b'x'; MAX_NAME + 1], false),
            (AddressForm::Other, &[0], true),
            (AddressForm::Other, &[0; MAX_NAME], true),
            (AddressForm::Other, &[0; MAX_NAME + 1], false),
            (AddressForm::Other, &[], false),
        ] {
            assert_eq!(form.check(address).is_ok(), taken, "{form:?} {address:?}");
        }
    }
}
