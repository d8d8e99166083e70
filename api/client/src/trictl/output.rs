//! What a command leaves behind: its output, or why there is none.

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use triarch_client::Error;

use crate::units::clean;

/// Why a command failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The VMM said no, or nothing.
    Client(Error),
    /// The command line asks for something that cannot be.
    Usage(String),
    /// The output cannot be written.
    Output(io::Error),
    /// What was asked for is there, and says that something failed.
    Failed(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Request(problem) => Self::Usage(problem),
            other => Self::Client(other),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Failure {
    /// What standard error is told, if anything: who closes a pipe knows.
    pub(crate) fn sentence(&self) -> Option<String> {
        let text = match self {
            Self::Client(error) => triarch_api::chain(error),
            Self::Usage(problem) | Self::Failed(problem) => problem.clone(),
            Self::Output(error) if error.kind() == ErrorKind::BrokenPipe => return None,
            Self::Output(error) => format!("cannot write the output: {error}"),
        };
        Some(clean(&text))
    }

    /// The table in docs/trictl.md.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Output(error) if error.kind() == ErrorKind::BrokenPipe => 0,
            Self::Client(error) if error.is_unanswered() => 3,
            Self::Usage(_) => 2,
            Self::Client(_) | Self::Output(_) | Self::Failed(_) => 1,
        })
    }
}

/// Prints `text`, which ends with a newline or gets one; nothing if it is empty.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    if !text.is_empty() && !text.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use triarch_client::ConnectError;

    use super::*;

    #[test]
    fn a_failure_is_one_sentence_and_one_code() {
        let shown = |failure: Failure| (failure.sentence(), format!("{:?}", failure.exit_code()));
        let code = |code: u8| format!("{:?}", ExitCode::from(code));
        let refused = Error::Refused {
            status: 409,
            message: "vm.pause: the VM is \u{1b}[2JPaused".to_owned(),
        };
        assert_eq!(
            shown(refused.into()),
            (Some("vm.pause: the VM is ?[2JPaused".into()), code(1))
        );
        let missing = Error::Connect {
            socket: "x.sock".into(),
            source: ConnectError::Missing,
        };
        let (sentence, exit) = shown(missing.into());
        assert_eq!(exit, code(3));
        assert!(sentence.is_some_and(|s| s.starts_with("cannot connect to x.sock: there is no such socket;")));
        assert_eq!(shown(Failure::Usage("no".into())), (Some("no".into()), code(2)));
        assert_eq!(shown(Error::Request("no".into()).into()).1, code(2));
        let pipe = io::Error::from(ErrorKind::BrokenPipe);
        assert_eq!(shown(pipe.into()), (None, code(0)));
        assert_eq!(shown(io::Error::from(ErrorKind::StorageFull).into()).1, code(1));
    }
}
