//! `trictl`: drives one VMM from a terminal or a script.

mod cli;
mod commands;
mod cpu;
mod documents;
mod follow;
mod inherit;
mod jobs;
mod output;
mod progress;
mod show;
mod table;
mod top;
mod units;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match commands::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if let Some(sentence) = failure.sentence() {
                eprintln!("trictl: {sentence}");
            }
            failure.exit_code()
        }
    }
}
