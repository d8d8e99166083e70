//! Completion scripts and manual pages, made from the command line's definition.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::cli::Cli;
use crate::output::{Failure, print};

/// Prints the completion script of `shell`.
pub(crate) fn completion(shell: Shell) -> Result<(), Failure> {
    print(&String::from_utf8_lossy(&script(shell)))
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "trictl", &mut script);
    script
}

/// Prints the manual page, or writes it and one for each command to `directory`.
pub(crate) fn manual(directory: Option<&Path>) -> Result<(), Failure> {
    match directory {
        Some(directory) => {
            let written =
                std::fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
            written.map_err(|error| Failure::Failed(format!("cannot write to {}: {error}", directory.display())))
        }
        None => print(&String::from_utf8_lossy(&page()?)),
    }
}

fn page() -> Result<Vec<u8>, Failure> {
    let mut page = Vec::new();
    Man::new(Cli::command()).render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_and_pages_know_every_command() {
        let page = String::from_utf8(page().expect("a page")).expect("UTF-8");
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(script(shell)).expect("UTF-8");
            for command in Cli::command().get_subcommands().map(|c| c.get_name().to_owned()) {
                assert!(script.contains(&command), "{shell}: {command}");
                assert!(page.contains(&command.replace('-', "\\-")), "{command}");
            }
        }
        assert!(page.contains("Exit status"), "{page}");
    }

    #[test]
    fn each_command_gets_a_page() {
        let directory = tempfile::tempdir().expect("a directory");
        manual(Some(&directory.path().join("man"))).expect("pages");
        let pages = std::fs::read_dir(directory.path().join("man"))
            .expect("a directory")
            .count();
        assert_eq!(pages, 1 + Cli::command().get_subcommands().count());
    }
}
