//! Small programs that tests run in a guest and busybox lacks.

use crate::sys::{self, Vsock};
use std::fs::File;
use std::io::{self, Write};
use std::thread;

/// Listens on a vsock port and sends back to each client what it sends, for ever.
///
/// # Errors
/// The port cannot be listened on.
pub fn vsock_echo(port: u32) -> io::Result<()> {
    let listener = Vsock::listen(port)?;
    // Tells whoever started this that clients may come.
    println!("listening");
    loop {
        let stream = listener.accept()?;
        thread::Builder::new().name("echo".into()).spawn(move || {
            // A client that breaks off is its own problem.
            let _ = io::copy(&mut &stream, &mut &stream);
            let _ = sys::shutdown_write(&stream);
        })?;
    }
}

/// Connects to a vsock port, sends standard input, and prints what comes back.
///
/// # Errors
/// Connecting, reading or writing failed.
pub fn vsock_connect(cid: u32, port: u32) -> io::Result<()> {
    let stream = Vsock::connect(cid, port)?;
    let sender = stream.try_clone()?;
    let sending = thread::Builder::new()
        .name("send".into())
        .spawn(move || send(&sender))?;
    let mut stdout = io::stdout().lock();
    io::copy(&mut &stream, &mut stdout)?;
    stdout.flush()?;
    sending
        .join()
        .map_err(|_| io::Error::other("the sending thread panicked"))?
}

fn send(mut stream: &File) -> io::Result<()> {
    io::copy(&mut io::stdin().lock(), &mut stream)?;
    sys::shutdown_write(stream)
}
