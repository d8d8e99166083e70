//! PPTT: what processors share (ACPI 5.2.30).

use super::super::table::Table;
use super::config::Topology;

const REVISION: u8 = 3;
const HEADER: u32 = 36;
const NODE: u32 = 20;
const PACKAGE: u32 = 1 << 0;
/// The number is a processor's UID.
const PROCESSOR: u32 = 1 << 1;
const THREAD: u32 = 1 << 2;
const LEAF: u32 = 1 << 3;

struct Nodes {
    table: Table,
    next: u32,
}

impl Nodes {
    /// Appends a node and returns where it is.
    fn add(&mut self, flags: u32, parent: u32, id: u32) -> u32 {
        self.table.push(&[0, NODE as u8, 0, 0]);
        for field in [flags, parent, id, 0] {
            self.table.push(&field.to_le_bytes());
        }
        let at = self.next;
        self.next += NODE;
        at
    }
}

/// Levels that have one member only are left out, but for the package.
pub(super) fn pptt(topology: &Topology) -> Vec<u8> {
    let mut nodes = Nodes {
        table: Table::new(*b"PPTT", REVISION),
        next: HEADER,
    };
    let mut uid = 0;
    for package_id in 0..u32::from(topology.packages) {
        let package = nodes.add(PACKAGE, 0, package_id);
        for die_id in 0..u32::from(topology.dies) {
            let die = match topology.dies {
                1 => package,
                _ => nodes.add(0, package, die_id),
            };
            for core_id in 0..u32::from(topology.cores) {
                if topology.threads == 1 {
                    nodes.add(PROCESSOR | LEAF, die, uid);
                    uid += 1;
                    continue;
                }
                let core = nodes.add(0, die, core_id);
                for _ in 0..topology.threads {
                    nodes.add(PROCESSOR | THREAD | LEAF, core, uid);
                    uid += 1;
                }
            }
        }
    }
    nodes.table.finish()
}
