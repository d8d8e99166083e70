//! Builds, hosts, demo, tests and benchmarks of Triarch: `cargo xtask VERB`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod arch;
mod bench;
mod build;
mod cache;
mod cpio;
mod daemons;
mod demo;
mod fuzz;
mod golden;
mod host;
mod images;
mod kernels;
mod licence;
mod lint;
mod local;
mod mend;
mod modules;
mod openapi;
mod packages;
mod passthrough;
mod payload;
mod qemu;
mod root;
mod schemathesis;
mod session;
mod smaps;
mod stdlib;
mod table;
mod test;
mod tools;

/// Builds, hosts, demo, tests and benchmarks of Triarch.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measure Triarch and its peers on this machine
    #[command(subcommand)]
    Bench(bench::Args),
    /// Build Triarch's programs, static
    Build(build::Args),
    /// Boot a stock Debian guest under Triarch and show how it did
    Demo(demo::Args),
    /// Feed random input to what reads other people's bytes
    Fuzz(fuzz::Args),
    /// Keep a snapshot that later versions have to restore
    Golden(golden::Args),
    /// Start a host, and run a command or a shell on it
    Host(session::Args),
    /// Check format, compiler's advice, house rules, licences and advisories
    Lint,
    /// Write docs/openapi.json, the description of the API
    Openapi,
    /// Run all tests, and count them
    Test(test::Args),
    /// Serve the agent on standard input
    #[command(name = local::AGENT_VERB, hide = true)]
    LocalAgent,
}

fn main() -> ExitCode {
    let result = run(Cli::parse().verb);
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Bench(args) => bench::run(&args)?,
        Verb::Build(args) => build::everything(&args)?,
        Verb::Demo(args) => demo::run(&args)?,
        Verb::Fuzz(args) => fuzz::run(&args)?,
        Verb::Golden(args) => golden::run(&args)?,
        Verb::Host(args) => return session::run(args),
        Verb::Lint => lint::run()?,
        Verb::Openapi => openapi::write()?,
        Verb::Test(args) => return Ok(test::run(&args)),
        Verb::LocalAgent => local::serve()?,
    }
    Ok(ExitCode::SUCCESS)
}
