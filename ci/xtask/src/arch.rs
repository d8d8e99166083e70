//! The processor architectures Triarch is built for.

use std::fmt;

use crate::packages::{self, Need};

/// An architecture of hosts, and so of the guests on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Arch {
    /// 64-bit x86: Intel, AMD, Hygon.
    #[value(name = "x86_64")]
    X86_64,
    /// 64-bit ARM.
    #[value(name = "aarch64")]
    Aarch64,
}

impl Arch {
    /// That of this machine; where Triarch knows no such architecture everything is cross-built for x86.
    pub fn native() -> Self {
        if std::env::consts::ARCH == Self::Aarch64.name() {
            Self::Aarch64
        } else {
            Self::X86_64
        }
    }

    /// Rust's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Debian's name.
    pub fn debian(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Rust's name of the target that programs are compiled for.
    pub fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The directory of libraries in Debian's multi-arch layout.
    pub fn libraries(self) -> &'static str {
        match self {
            Self::X86_64 => "usr/lib/x86_64-linux-gnu",
            Self::Aarch64 => "usr/lib/aarch64-linux-gnu",
        }
    }

    /// Where Debian's dynamic loader lies.
    pub fn loader(self) -> &'static str {
        match self {
            Self::X86_64 => "lib64/ld-linux-x86-64.so.2",
            Self::Aarch64 => "lib/ld-linux-aarch64.so.1",
        }
    }

    /// The C compiler that links for it on this machine.
    pub fn linker(self) -> &'static str {
        match self {
            native if native == Self::native() => "cc",
            Self::X86_64 => "x86_64-linux-gnu-gcc",
            Self::Aarch64 => "aarch64-linux-gnu-gcc",
        }
    }

    /// What linking static programs for it needs.
    pub fn link_needs(self) -> &'static [Need] {
        match self {
            native if native == Self::native() => &packages::LINK,
            Self::X86_64 => &packages::LINK_FOR_X86_64,
            Self::Aarch64 => &packages::LINK_FOR_AARCH64,
        }
    }

    /// What the kernel of an emulated host is told: x86's tries its timer when it starts, and panics when nothing comes in time, which is
    /// how it is when the emulator waits for a busy machine. With interrupts remapped it has no other way to go on.
    pub fn of_slow_hosts(self) -> &'static str {
        match self {
            Self::X86_64 => "no_timer_check",
            Self::Aarch64 => "",
        }
    }

    /// The serial console's name under Linux.
    pub fn console(self) -> &'static str {
        match self {
            Self::X86_64 => "ttyS0",
            Self::Aarch64 => "ttyAMA0",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_machine_s_own_compiler_has_no_prefix() {
        let plain = |arch: Arch| arch.linker() == "cc";
        assert!(plain(Arch::native()));
        let other = [Arch::X86_64, Arch::Aarch64].into_iter().find(|a| *a != Arch::native());
        assert!(other.is_some_and(|arch| !plain(arch) && arch.linker().starts_with(arch.name())));
    }
}
