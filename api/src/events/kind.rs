//! Every event there is. The table in docs/api.md is made from these.

/// What can happen.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Whose event it is: `vmm`, `vm`, `vcpu`, `memory`, `migration`, `virtio-device`, `guest`, `job`.
    pub source: &'static str,
    /// What happened.
    pub event: &'static str,
    /// Names of the properties it has.
    pub properties: &'static [&'static str],
    /// When it happens, in the words of the documentation.
    pub meaning: &'static str,
}

macro_rules! kinds {
    ($($name:ident: $source:literal $event:literal [$($property:literal),*] $meaning:literal;)*) => {
        $(
            #[doc = concat!("`", $source, "`: `", $event, "`: ", $meaning, ".")]
            pub const $name: Kind = Kind {
                source: $source,
                event: $event,
                properties: &[$($property),*],
                meaning: $meaning,
            };
        )*

        /// All of them.
        pub const ALL: &[Kind] = &[$($name),*];
    };
}

kinds! {
    VMM_STARTING: "vmm" "starting" [] "the process has started; always the first";
    VMM_SHUTDOWN: "vmm" "shutdown" [] "the process ends; the last one";
    VMM_LOST: "vmm" "lost" ["count"] "in the place of so many events that are not kept any more; its `id` is that of the last of them";
    VM_CREATED: "vm" "created" [] "a configuration was taken";
    VM_BOOTING: "vm" "booting" [] "the guest is being built";
    VM_BOOTED: "vm" "booted" [] "the guest runs";
    VM_PAUSING: "vm" "pausing" [] "a client asked for a pause";
    VM_PAUSED: "vm" "paused" [] "the guest stands still";
    VM_RESUMING: "vm" "resuming" [] "a client asked for the end of a pause";
    VM_RESUMED: "vm" "resumed" [] "the guest runs again";
    VM_REBOOTING: "vm" "rebooting" [] "a client or the guest asked for a reset; `booting` and `booted` follow";
    VM_REBOOTED: "vm" "rebooted" [] "the guest runs anew";
    VM_POWER_BUTTON: "vm" "power-button" [] "the guest was asked to shut down";
    VM_RESIZING: "vm" "resizing" [] "a client asked for another size";
    VM_RESIZED: "vm" "resized" [] "the VM has it";
    VM_SHUTDOWN: "vm" "shutdown" [] "the guest has ended, by itself or by request";
    VM_FAILED: "vm" "failed" ["error"] "a vCPU cannot go on, or saved memory cannot be read any more; the guest has ended";
    VM_SNAPSHOTTING: "vm" "snapshotting" [] "a client asked for a snapshot, which is being written";
    VM_SNAPSHOTTED: "vm" "snapshotted" [] "it is whole";
    VM_RESTORING: "vm" "restoring" [] "a guest is being built from a snapshot";
    VM_RESTORED: "vm" "restored" [] "it is as it was saved; `resumed` follows when it runs";
    VM_MEMORY_THERE: "vm" "memory-restored" [] "all memory of a guest that was restored with `OnDemand`, or came by post-copy, is there, and where it came from is not needed any more";
    VM_MIGRATED: "vm" "migrated" ["address", "downtime_ms"] "the guest runs at the destination, and is no longer here; `deleted` follows";
    VM_RECEIVED: "vm" "received" ["address"] "a guest came from another VMM and goes on here";
    VM_DELETED: "vm" "deleted" [] "the configuration was forgotten";
    VCPU_STARTED: "vcpu" "started" ["index"] "the guest started a vCPU that it was given while it ran";
    VCPU_EJECTED: "vcpu" "ejected" ["index"] "the guest gave a vCPU back";
    VCPU_WITHDRAWN: "vcpu" "withdrawn" ["index"] "a vCPU that the guest had not looked at was taken back";
    PCI_ADDED: "device" "added" ["id", "bdf"] "a guest that runs was given a device";
    PCI_REMOVED: "device" "removed" ["id"] "the guest has the device no more, and the host is done with it";
    PCI_REFUSED: "device" "refused" ["id", "reason"] "the guest does not take a device, or does not give it back";
    PCI_WANTED: "device" "wanted" ["id"] "the host asks for a device of its own back, which is then asked of the guest, and taken by force if the guest does not give it";
    PCI_FAILED: "device" "failed" ["id", "reason"] "a device of the host broke, and is taken from the guest by force";
    VCPU_REFUSED: "vcpu" "refused" ["index", "reason"] "the guest does not take a vCPU, or does not give it back";
    MEMORY_ADDED: "memory" "added" ["address", "size"] "the guest took memory that it was given while it ran";
    MEMORY_REMOVED: "memory" "removed" ["address", "size"] "the guest gave memory back";
    MEMORY_REFUSED: "memory" "refused" ["address", "size", "reason"] "the guest does not take memory, or does not give it back";
    MIGRATION_LISTENING: "migration" "listening" ["job", "address"] "a guest can be sent here";
    MIGRATION_PREPARED: "migration" "prepared" ["job"] "a source has offered its guest, and there is room for it";
    MIGRATION_STARTED: "migration" "started" ["job", "address"] "the guest's memory is being copied to the destination while it runs";
    MIGRATION_THROTTLED: "migration" "throttled" ["job", "percent"] "the guest writes memory too fast, and its vCPUs are held for so much of the time; 0: they are not held any more";
    MIGRATION_SWITCHING: "migration" "switching" ["job"] "the guest stands still, and what is left is being copied";
    MIGRATION_RETREATED: "migration" "retreated" ["job"] "the guest goes on at the source, since it would have stood still for too long; it is tried again";
    MIGRATION_COMMITTED: "migration" "committed" ["job"] "the guest is given away";
    MIGRATION_ANNOUNCED: "migration" "announced" ["interfaces"] "the network was told of the guest's new place, at so many interfaces";
    MIGRATION_POST_COPY: "migration" "post-copy" ["job"] "the guest runs at the destination, and memory that it lacks comes from the source";
    MIGRATION_PAUSED: "migration" "post-copy-paused" ["job", "error"] "the connection was lost meanwhile: whatever of the guest needs memory that it lacks stands still";
    MIGRATION_RECOVERED: "migration" "recovered" ["job"] "the connection is there again, and memory comes";
    MIGRATION_FAILED: "migration" "failed" ["job", "guest", "error"] "the guest was not moved; `guest` is `here`, `paused`, `unknown` if it may run at the destination, or `lost` if it lacked memory there and was given up; at the destination `none`";
    GUEST_PANIC: "guest" "panic" ["event"] "the guest says that it crashed";
    DEVICE_ACTIVATED: "virtio-device" "activated" ["id"] "the guest's driver started the device";
    DEVICE_RESET: "virtio-device" "reset" ["id"] "the guest's driver reset the device, which it had started";
    DEVICE_BROKEN: "virtio-device" "broken" ["id"] "the device cannot work on its queues until the driver resets it";
    DEVICE_CONNECTED: "virtio-device" "connected" ["id"] "a daemon serves the device";
    DEVICE_DISCONNECTED: "virtio-device" "disconnected" ["id", "reason"] "the device has no daemon, its requests wait for one";
    DEVICE_FAILING: "virtio-device" "failing" ["id", "reason"] "no daemon came back in time, the device's requests fail";
    JOB_STARTED: "job" "started" ["job", "kind"] "long work began";
    JOB_DONE: "job" "done" ["job", "kind"] "it succeeded";
    JOB_FAILED: "job" "failed" ["job", "kind", "error"] "it failed";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_them_all() {
        let documentation = include_str!("../../../docs/api.md");
        let rows: Vec<String> = ALL
            .iter()
            .map(|kind| {
                let properties: Vec<_> = kind.properties.iter().map(|name| format!("`{name}`")).collect();
                format!(
                    "| `{}` | `{}` | {} | {} |",
                    kind.source,
                    kind.event,
                    properties.join(", "),
                    kind.meaning
                )
            })
            .collect();
        let table = rows.join("\n");
        assert!(documentation.contains(&table), "docs/api.md should have\n{table}");
    }

    #[test]
    fn no_two_are_the_same() {
        for (at, kind) in ALL.iter().enumerate() {
            let same = |other: &&Kind| (other.source, other.event) == (kind.source, kind.event);
            assert_eq!(ALL.iter().position(|other| same(&other)), Some(at));
        }
    }
}
