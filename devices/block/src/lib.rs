//! Disk engines: files and block devices, io_uring and threads; knows nothing of virtio.
