//! Where a vCPU sits: thread, core, die, package.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The shape of the guest's processor, in units per next larger unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages (sockets).
    pub packages: u16,
}

/// Why a topology cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TopologyError {
    /// A level has no members.
    #[error("every level of the CPU topology needs at least 1 member")]
    Zero,
    /// The product is not the number of vCPUs.
    #[error(
        "the CPU topology {threads}:{cores}:{dies}:{packages} has {product} CPUs, but max is {max}; make them equal"
    )]
    Product {
        /// Threads of a core.
        threads: u16,
        /// Cores of a die.
        cores: u16,
        /// Dies of a package.
        dies: u16,
        /// Packages.
        packages: u16,
        /// Their product.
        product: u64,
        /// Largest number of vCPUs.
        max: u32,
    },
}

impl Topology {
    /// One package with `max` single-threaded cores: what a guest gets when nothing is asked for.
    pub fn flat(max: u16) -> Self {
        Self {
            threads_per_core: 1,
            cores_per_die: max.max(1),
            dies_per_package: 1,
            packages: 1,
        }
    }

    /// Checks it against the largest number of vCPUs.
    pub fn check(&self, max: u32) -> Result<(), TopologyError> {
        let levels = [
            self.threads_per_core,
            self.cores_per_die,
            self.dies_per_package,
            self.packages,
        ];
        if levels.contains(&0) {
            return Err(TopologyError::Zero);
        }
        let product = levels.iter().map(|n| u64::from(*n)).product();
        if product != u64::from(max) {
            let [threads, cores, dies, packages] = levels;
            return Err(TopologyError::Product {
                threads,
                cores,
                dies,
                packages,
                product,
                max,
            });
        }
        Ok(())
    }

    /// Width in bits of the thread id within an APIC id.
    pub fn thread_bits(&self) -> u32 {
        bits(self.threads_per_core)
    }

    /// Width in bits of core and thread id together.
    pub fn core_bits(&self) -> u32 {
        self.thread_bits() + bits(self.cores_per_die)
    }

    /// Width in bits of die, core and thread id together: what lies above is the package.
    pub fn package_shift(&self) -> u32 {
        self.core_bits() + bits(self.dies_per_package)
    }

    /// Threads of a package.
    pub fn threads_per_package(&self) -> u32 {
        u32::from(self.threads_per_core) * u32::from(self.cores_per_die) * u32::from(self.dies_per_package)
    }

    /// The APIC id of vCPU `index`: each level in a bit field of its own, as the CPUs' manuals have it.
    pub fn apic_id(&self, index: u32) -> u32 {
        let threads = u32::from(self.threads_per_core);
        let cores = u32::from(self.cores_per_die);
        let dies = u32::from(self.dies_per_package);
        let thread = index % threads;
        let core = index / threads % cores;
        let die = index / (threads * cores) % dies;
        let package = index / (threads * cores * dies);
        package << self.package_shift() | die << self.core_bits() | core << self.thread_bits() | thread
    }
}

/// Bits needed to number `n` members.
fn bits(n: u16) -> u32 {
    u16::BITS - n.saturating_sub(1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_keep_levels_apart() {
        let t = Topology {
            threads_per_core: 2,
            cores_per_die: 3,
            dies_per_package: 1,
            packages: 2,
        };
        t.check(12).expect("12 CPUs");
        assert_eq!((t.thread_bits(), t.core_bits(), t.package_shift()), (1, 3, 3));
        let ids: Vec<u32> = (0..12).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
    }

    #[test]
    fn a_flat_topology_numbers_straight() {
        let t = Topology::flat(254);
        assert!((0..254).all(|i| t.apic_id(i) == i));
        assert_eq!(t.package_shift(), 8);
        assert_eq!(Topology::flat(1).package_shift(), 0);
    }

    #[test]
    fn wrong_products_are_named() {
        let t = Topology {
            threads_per_core: 2,
            cores_per_die: 2,
            dies_per_package: 1,
            packages: 1,
        };
        assert!(matches!(
            t.check(3),
            Err(TopologyError::Product { product: 4, max: 3, .. })
        ));
        assert_eq!(Topology { packages: 0, ..t }.check(0), Err(TopologyError::Zero));
    }
}
