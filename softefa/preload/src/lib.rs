//! The emulated EFA device, preloaded under libfabric's efa provider.
mod redirect;
