//! Sockets, and the files of consoles.

use super::{builder, each, each_fails, failed, payload_tests, refused, text};
use anyhow::Result;
use std::fs;
use std::os::unix::net::UnixListener;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("bad_input":
    api_sockets,
    vsock_sockets,
    consoles,
    consoles_in_conflict,
    sockets_go_when_a_later_part_is_refused,
);

/// A socket that somebody listens on, and a file that is no socket.
fn occupied(context: &Context) -> Result<(UnixListener, String, String)> {
    let dir = text(&context.dir)?;
    let (socket, file) = (format!("{dir}/live"), format!("{dir}/file"));
    fs::write(&file, "precious")?;
    Ok((UnixListener::bind(&socket)?, socket, file))
}

fn api_sockets(context: &Context) -> Result<Outcome> {
    let (_listener, live, file) = occupied(context)?;
    let dir = text(&context.dir)?;
    let long = format!("{dir}/{}", "a".repeat(120));
    let in_use = ["--api-socket", "another process", &live];
    each_fails(
        context,
        "--api-socket",
        &[
            (&live, &in_use),
            (&format!("path={live}"), &in_use),
            (&file, &[&file, "is no socket", "remove it"]),
            (dir, &[dir, "is no socket"]),
            ("/nonexistent/a", &["/nonexistent/a", "No such file"]),
            (&long, &[&long, "too long"]),
            ("fd=99", &["descriptor 99", "not inherited"]),
            ("fd=0", &["descriptor 0", "not a listening unix"]),
        ],
    )?;
    each(
        context,
        "--api-socket",
        &[
            ("", &["path is empty", "path=FILE"]),
            ("path=", &["path is empty", "path=FILE"]),
            ("fd=x", &["fd=x", "fd=3"]),
        ],
    )?;
    anyhow::ensure!(fs::read(&file)? == b"precious", "a file was overwritten");
    Ok(Outcome::Passed)
}

fn vsock_sockets(context: &Context) -> Result<Outcome> {
    let (_listener, live, file) = occupied(context)?;
    let long = format!("/tmp/{}", "a".repeat(120));
    let socket = |path: &str| format!("cid=3,socket={path}");
    each_fails(
        context,
        "--vsock",
        &[
            (&socket(&live), &["another process", &live]),
            (&socket(&file), &[&file, "is no socket", "remove it"]),
            (&socket("/nonexistent/v"), &["/nonexistent/v", "No such file"]),
            (&socket(&long), &[&long, "too long", "96 bytes"]),
        ],
    )?;
    each(
        context,
        "--vsock",
        &[
            (&socket(""), &["vsock.socket is empty", "path"]),
            ("cid=2,socket=/nonexistent/v", &["cid is 2", "between 3"]),
            (
                "cid=4294967295,socket=/nonexistent/v",
                &["cid is 4294967295", "between 3"],
            ),
            ("cid=x,socket=/nonexistent/v", &["cid=x", "no whole number"]),
            ("cid=3", &["socket=PATH"]),
            ("socket=/nonexistent/v", &["cid=3"]),
        ],
    )?;
    anyhow::ensure!(fs::read(&file)? == b"precious", "a file was overwritten");
    Ok(Outcome::Passed)
}

fn consoles(context: &Context) -> Result<Outcome> {
    let (_listener, live, file) = occupied(context)?;
    let dir = text(&context.dir)?;
    for flag in ["--serial", "--console"] {
        each_fails(
            context,
            flag,
            &[
                (&format!("socket={live}"), &[flag, "another process", &live]),
                (&format!("socket={file}"), &[flag, &file, "is no socket"]),
                ("socket=/nonexistent/s", &[flag, "/nonexistent/s", "No such file"]),
                (&format!("file={dir}"), &[flag, dir, "Is a directory"]),
                ("file=/nonexistent/f", &[flag, "/nonexistent/f", "No such file"]),
            ],
        )?;
        each(
            context,
            flag,
            &[
                ("socket=", &[&flag[2..], ".socket is missing", "a path"]),
                ("file=", &[&flag[2..], ".file is missing", "a path"]),
                ("bogus", &[flag, "bogus", "file=PATH"]),
                ("", &[flag, "''", "file=PATH"]),
            ],
        )?;
    }
    let flag = "--debug-console";
    each(
        context,
        flag,
        &[
            ("pty", &["debug_console.mode is a pty", "File"]),
            ("socket=/nonexistent/s", &["debug_console.mode is a socket", "File"]),
            ("file=", &["debug_console.file is missing", "a path"]),
        ],
    )?;
    let directory = format!("file={dir}");
    each_fails(context, flag, &[(&directory, &[flag, dir, "Is a directory"])])?;
    anyhow::ensure!(fs::read(&file)? == b"precious", "a file was overwritten");
    Ok(Outcome::Passed)
}

fn consoles_in_conflict(context: &Context) -> Result<Outcome> {
    let both = |value: &str| -> Result<_> { Ok(builder(context)?.set("--serial", value).set("--console", value)) };
    refused(context, both("tty")?, &["serial.mode", "console.mode", "Off or Null"])?;
    let path = format!("{}/one", text(&context.dir)?);
    for kind in ["file", "socket"] {
        refused(context, both(&format!("{kind}={path}"))?, &["two consoles", &path])?;
    }
    Ok(Outcome::Passed)
}

fn sockets_go_when_a_later_part_is_refused(context: &Context) -> Result<Outcome> {
    let vm = builder(context)?;
    let path = |name: &str| vm.dir().join(name).display().to_string();
    let (console, vsock, api) = (path("console.sock"), path("vsock.sock"), path("api.sock"));
    let vm = vm
        .set("--console", format!("socket={console}"))
        .flag("--vsock", format!("cid=3,socket={vsock}"))
        .flag("--api-socket", api)
        .set("--kernel", "/nonexistent/vmlinux");
    failed(context, vm, &["/nonexistent/vmlinux", "does not exist"])?;
    Ok(Outcome::Passed)
}
