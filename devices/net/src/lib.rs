//! Tap devices and packet helpers; knows nothing of virtio.
