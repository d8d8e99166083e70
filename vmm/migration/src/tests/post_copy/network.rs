//! A network that loses its connections.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// A network that can be cut.
pub(super) struct Network {
    pub(super) front: PathBuf,
    pub(super) open: Arc<AtomicBool>,
    passing: Arc<Mutex<Vec<UnixStream>>>,
    /// Bytes that may pass until it is cut by itself.
    pub(super) fuse: Arc<AtomicU64>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Network {
    pub(super) fn new(front: PathBuf, back: PathBuf) -> Self {
        let listener = UnixListener::bind(&front).expect("listens");
        let network = Self {
            front,
            open: Arc::new(AtomicBool::new(true)),
            passing: Arc::default(),
            fuse: Arc::new(AtomicU64::new(u64::MAX)),
            stop: Arc::default(),
            thread: None,
        };
        let (open, passing, fuse, stop) = (
            network.open.clone(),
            network.passing.clone(),
            network.fuse.clone(),
            network.stop.clone(),
        );
        let thread = thread::spawn(move || {
            while let Ok((source, _)) = listener.accept() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                if !open.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(destination) = UnixStream::connect(&back) else {
                    continue;
                };
                let copy = |stream: &UnixStream| stream.try_clone().expect("a copy");
                passing.lock().unwrap().extend([copy(&source), copy(&destination)]);
                for (mut from, mut to) in [(copy(&source), copy(&destination)), (destination, source)] {
                    let (passing, fuse) = (passing.clone(), fuse.clone());
                    thread::spawn(move || {
                        let mut buffer = vec![0; 4096];
                        while let Ok(len) = from.read(&mut buffer) {
                            let left = fuse.load(Ordering::SeqCst);
                            if left < len as u64 {
                                fuse.store(u64::MAX, Ordering::SeqCst);
                                cut(&passing);
                            } else if left != u64::MAX {
                                fuse.store(left - len as u64, Ordering::SeqCst);
                            }
                            if len == 0 || to.write_all(&buffer[..len]).is_err() {
                                break;
                            }
                        }
                        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                    });
                }
            }
        });
        Self {
            thread: Some(thread),
            ..network
        }
    }

    pub(super) fn cut(&self) {
        cut(&self.passing);
    }
}

fn cut(passing: &Mutex<Vec<UnixStream>>) {
    for stream in passing.lock().unwrap().drain(..) {
        let _ = stream.shutdown(Shutdown::Both);
    }
}
