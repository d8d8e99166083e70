//! seccomp filters, one per class of thread.
