//! Where front ends and clients connect to.

use std::path::Path;

use triarch_api::server::{ListenError, Listener};

/// Listens where `text` says: at a path, or with `fd=N` on a socket that listens already and was inherited as descriptor N.
pub fn listen(text: &str) -> Result<Listener, ListenError> {
    match text.strip_prefix("fd=").and_then(|number| number.parse().ok()) {
        Some(fd) => Listener::inherit(fd),
        None => Listener::bind(Path::new(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_a_path_or_a_number() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a.sock");
        let listener = listen(path.to_str().expect("text")).expect("listen");
        std::os::unix::net::UnixStream::connect(&path).expect("connect");
        drop(listener);
        assert!(!path.exists());
        let error = listen("fd=987").expect_err("no such descriptor");
        assert!(error.to_string().contains("987"), "{error}");
    }
}
