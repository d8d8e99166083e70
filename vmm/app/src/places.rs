//! Flags that name a place: where the API listens, and where events and audit lines go.

use std::path::PathBuf;

/// Where the API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ApiSocket {
    /// A socket to make at this path.
    Path(PathBuf),
    /// A listening socket inherited as this descriptor.
    Fd(i32),
}

/// Where events go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// A file or a named pipe.
    Path(PathBuf),
    /// An inherited descriptor.
    Fd(i32),
}

/// Where audit lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AuditLog {
    /// A file.
    File(PathBuf),
    /// The syslog daemon that listens on this socket.
    Syslog(PathBuf),
    /// The journal that listens on this socket.
    Journal(PathBuf),
}

/// The value of `--api-socket`.
pub(crate) fn api_socket(text: &str) -> anyhow::Result<ApiSocket> {
    if matches!(text, "" | "path=") {
        anyhow::bail!("--api-socket: the path is empty; write path=FILE");
    }
    match text.split_once('=') {
        Some(("fd", fd)) => match fd.parse() {
            Ok(fd) if fd >= 0 => Ok(ApiSocket::Fd(fd)),
            _ => anyhow::bail!("--api-socket: fd={fd} is no descriptor number; write fd=3 for an inherited socket"),
        },
        Some(("path", path)) => Ok(ApiSocket::Path(path.into())),
        _ => Ok(ApiSocket::Path(text.into())),
    }
}

/// The value of `--event-monitor`.
pub(crate) fn event_monitor(text: &str) -> anyhow::Result<Target> {
    match text.split_once('=') {
        Some(("path", path)) if !path.is_empty() => Ok(Target::Path(path.into())),
        Some(("fd", fd)) => match fd.parse() {
            Ok(fd) if fd >= 0 => Ok(Target::Fd(fd)),
            _ => anyhow::bail!("--event-monitor: fd={fd} is no descriptor number; write fd=3 for an inherited pipe"),
        },
        _ => anyhow::bail!("--event-monitor: '{text}' is neither path=FILE nor fd=N"),
    }
}

/// The value of `--audit-log`.
pub(crate) fn audit_log(text: &str) -> anyhow::Result<AuditLog> {
    let (kind, path) = text.split_once('=').unwrap_or((text, ""));
    let or = |standard: &str| PathBuf::from(if path.is_empty() { standard } else { path });
    match kind {
        "file" if !path.is_empty() => Ok(AuditLog::File(path.into())),
        "syslog" => Ok(AuditLog::Syslog(or("/dev/log"))),
        "journald" => Ok(AuditLog::Journal(or("/run/systemd/journal/socket"))),
        _ => anyhow::bail!("--audit-log: '{text}' is none of file=PATH, syslog[=SOCKET] and journald[=SOCKET]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_events_and_audit_lines_are_understood_or_refused() {
        assert_eq!(event_monitor("path=/a=b").expect("a path"), Target::Path("/a=b".into()));
        assert_eq!(event_monitor("fd=3").expect("a number"), Target::Fd(3));
        for bad in ["", "path=", "fd=", "fd=-1", "fd=x", "/a", "file=/a"] {
            assert!(event_monitor(bad).is_err(), "{bad}");
        }
        assert_eq!(audit_log("file=/a").expect("a file"), AuditLog::File("/a".into()));
        assert_eq!(
            audit_log("syslog").expect("syslog"),
            AuditLog::Syslog("/dev/log".into())
        );
        assert_eq!(audit_log("syslog=/s").expect("a socket"), AuditLog::Syslog("/s".into()));
        assert_eq!(
            audit_log("journald").expect("the journal"),
            AuditLog::Journal("/run/systemd/journal/socket".into())
        );
        for bad in ["", "file=", "file", "/a", "journal"] {
            assert!(audit_log(bad).is_err(), "{bad}");
        }
    }
}
