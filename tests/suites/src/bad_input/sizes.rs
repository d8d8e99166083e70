//! Memory and processors.

use super::{each, each_fails, payload_tests};
use anyhow::Result;
use triarch_harness::suite::{Context, Outcome};

payload_tests!("bad_input":
    memory_sizes,
    huge_pages,
    processor_counts,
);

fn memory_sizes(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--memory",
        &[
            ("0", &["size is 0", "MiB"]),
            ("size=0", &["size is 0", "MiB"]),
            ("", &["''", "size"]),
            ("size=", &["''", "is not a size", "K, M, G"]),
            ("size=-1", &["'-1'", "is not a size"]),
            ("size=12345", &["size is 12345", "MiB"]),
            ("size=18446744073709551615", &["size is 18446744073709551615", "MiB"]),
            (
                "size=99999999999999999999G",
                &["99999999999999999999G", "is not a size"],
            ),
            ("1X", &["1X", "key=value"]),
            ("size=1G,sharde=on", &["sharde", "shared"]),
            ("size=1G,shared=maybe", &["shared=maybe", "on nor off"]),
            ("size=1G,shared=on,shared=off", &["'shared'", "once"]),
            (
                "size=1G,mergeable=on,shared=on",
                &["mergeable", "memory.shared and memory.hugepages off"],
            ),
        ],
    )?;
    each_fails(
        context,
        "--memory",
        &[
            ("size=1000000G", &["1024000000 MiB", "the host has", "lower"]),
            ("size=16777215T", &["the host has", "lower"]),
            ("size=1M", &["not free RAM", "at least"]),
        ],
    )
}

fn huge_pages(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--memory",
        &[(
            "size=64M,hugepage_size=2M",
            &["memory.hugepage_size needs memory.hugepages"],
        )],
    )?;
    each_fails(
        context,
        "--memory",
        &[
            (
                "size=64M,hugepages=on,hugepage_size=3M",
                &["3145728", "/sys/kernel/mm/hugepages"],
            ),
            // An odd number of MiB is no whole number of huge pages of any size.
            ("size=65537M,hugepages=on", &["whole pages", "a multiple"]),
            ("size=1000000G,hugepages=on", &["huge page pool", "nr_hugepages"]),
        ],
    )
}

fn processor_counts(context: &Context) -> Result<Outcome> {
    each(
        context,
        "--cpus",
        &[
            ("0", &["boot_vcpus is 0", "between 1 and 254"]),
            ("boot=0", &["boot_vcpus is 0", "between 1 and 254"]),
            ("255", &["boot_vcpus is 255", "between 1 and 254"]),
            ("99999999999", &["99999999999", "too large"]),
            ("boot=-1", &["boot=-1", "no whole number"]),
            ("boot=", &["boot=", "no whole number"]),
            ("two", &["'two'", "boot"]),
            ("boot=4,max=2", &["max_vcpus is 2", "boot_vcpus (4)"]),
            ("boot=1,max=255", &["max_vcpus is 255", "254"]),
            ("boot=3,topology=2:1:1:1", &["2:1:1:1", "max is 3"]),
            ("boot=1,topology=1:0:1:1", &["topology", "at least 1"]),
            ("boot=1,topology=65535:65535:65535:65535", &["max is 1", "equal"]),
            ("boot=1,topology=4", &["topology=4", "threads per core"]),
        ],
    )
}
