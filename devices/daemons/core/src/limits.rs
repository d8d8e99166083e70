//! What the process may use.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Lets the process open as many files as it may at most. Shells and service managers start programs with 1024 for the sake of `select`,
/// which nothing here uses; a few dozen front ends of several queues take more.
pub fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    // It is no more than we may have. Should it fail, what does not fit any more says so.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    );
}
