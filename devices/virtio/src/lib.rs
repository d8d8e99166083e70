//! virtio 1.x transport, rings and devices.
