//! Memory that comes and goes while the guest runs.

pub(crate) mod virtio_mem;
