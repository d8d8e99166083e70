//! Loads kernels, initramfs and command lines into guest memory.
