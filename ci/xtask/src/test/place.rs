//! Where tests with Linux guests run: hosts, each with all tests or some.

use std::fmt;

use anyhow::{Result, ensure};

use crate::arch::Arch;
use crate::host::{Kind, Options};
use crate::kernels::Version;

/// The tests on a second ARM host: those that see another processor and another KVM.
const SECOND_ARM: [&str; 19] = [
    "snapshot::linux_6_12_goes_on_in_another_process",
    "boot::linux_6_1_on_1_cpu",
    "boot::linux_6_1_on_4_cpus",
    "boot::linux_6_12_on_1_cpu",
    "boot::linux_6_12_on_4_cpus",
    "boot::cpus_stop_and_start_again",
    "boot::linux_6_12_without_the_cpus_to_come",
    "blk::data_matches_the_hosts_file",
    "net::guest_and_host_talk",
    "power::a_panic_resets",
    "hotplug::vcpus_come_and_go_under_linux_6_12",
    "payload::hotplug::processors_come_and_go",
    "payload::hotplug::any_order_is_as_a_model_says",
    "payload::boot::says_hello",
    "payload::smp::starts_sixteen",
    "payload::smp::interrupts_others",
    "payload::blk::runs_several_queues",
    "payload::cpu_state::comes_back_as_it_was",
    "payload::cpu_state::goes_on_in_another_vm",
];

/// What a run without a named host leaves out on Hygon, whose KVM is AMD's: tests of daemons, since what they see was seen there, and of
/// memory that comes with one of the two kernels, which AMD has.
const NOT_ON_HYGON: [&str; 33] = [
    // Not seen often enough.
    "migration::linux_6_1_goes_back_and_forth",
    "migration::linux_6_12_goes_back_and_forth",
    "migration::daemons::linux_6_1_goes_back_and_forth",
    "migration::daemons::linux_6_12_goes_back_and_forth",
    "vhost::data_matches_on_linux_6_1",
    "vhost::data_matches_on_linux_6_12",
    "vhost::a_stopped_daemon_stalls_its_disk_only",
    "vhost::pauses_without_a_daemon",
    "vhost::grows_and_refuses_another_disk",
    "vhost::requests_fail_when_told_so",
    "vhost::blkd::data_matches",
    "vhost::blkd::a_stopped_daemon_stalls_its_disk_only",
    "vhost::blkd::pauses_without_a_daemon",
    "vhost::blkd::grows_and_refuses_another_disk",
    "vhost::blkd::requests_fail_when_told_so",
    "vhost_fs::files_are_shared_with_linux_6_1",
    // On AMD.
    "dimms::memory_comes_and_goes_under_linux_6_12",
    "virtio_mem::linux_6_12_grows_and_shrinks",
    "plug::vhost_fs::all_kinds_come_and_go_under_linux_6_1",
    "plug::vhost_fs::all_kinds_come_and_go_under_linux_6_12",
    "vhost_net::guests_talk_over_netd",
    "vhost_net::guests_talk_over_testpmd",
    "ovs::guest_and_host_talk_on_linux_6_12",
    "passt::guest_and_host_talk_on_linux_6_12",
    // Devices of the host, on AMD, or not seen often enough.
    "vfio::what_cannot_be_had_is_refused",
    "vfio::too_little_memory_may_be_locked",
    "vfio::a_guest_with_a_device_stays",
    "vfio::nvme_data_matches_on_linux_6_1",
    "vfio::the_host_gets_its_disk_back",
    "vfio::a_paused_guest_loses_its_disk",
    "vfio::nvme_comes_and_goes_under_linux_6_1",
    "vfio::nvme_reaches_memory_that_came",
    "vfio::a_disk_that_works_never_leaves_the_guest",
];

/// And on AMD. Two guests and their switch share one emulated processor there; testpmd never sleeps, so that this takes its time.
const NOT_ON_AMD: [&str; 14] = [
    // Not seen often enough.
    "migration::linux_6_1_goes_back_and_forth",
    "migration::linux_6_12_goes_back_and_forth",
    "migration::daemons::linux_6_12_goes_back_and_forth",
    // With the other kernel.
    "plug::vhost_fs::all_kinds_come_and_go_under_linux_6_1",
    // On Hygon.
    "dimms::memory_comes_and_goes_under_linux_6_1",
    "virtio_mem::linux_6_1_grows_and_shrinks",
    // As with netd.
    "vhost_net::guests_talk_over_testpmd",
    // Devices of the host, on Hygon, or not seen often enough.
    "vfio::nvme_data_matches_on_linux_6_12",
    "vfio::a_restarted_guest_has_its_disk_again",
    "vfio::the_host_gets_its_disk_back",
    "vfio::a_paused_guest_loses_its_disk",
    "vfio::nvme_comes_and_goes_under_linux_6_1",
    "vfio::nvme_reaches_memory_that_came",
    "vfio::a_disk_that_works_never_leaves_the_guest",
];

/// And on ARM, where Linux guests see the same, or the bare-metal guest does. Open vSwitch serves there, but it takes longer to agree on two
/// ports than a busy host has; four wait half a minute for what is the same everywhere; the others were not seen there, or not often enough.
const NOT_ON_ARM: [&str; 162] = [
    "migration::linux_6_1_goes_back_and_forth",
    "migration::linux_6_12_goes_back_and_forth",
    "migration::daemons::linux_6_1_goes_back_and_forth",
    "migration::daemons::linux_6_12_goes_back_and_forth",
    "dimms::memory_comes_and_goes_under_linux_6_1",
    "virtio_mem::linux_6_12_grows_and_shrinks",
    "plug::vhost_fs::all_kinds_come_and_go_under_linux_6_1",
    "plug::vhost_fs::all_kinds_come_and_go_under_linux_6_12",
    "ovs::guest_and_host_talk_on_linux_6_12",
    "passt::guest_and_host_talk_on_linux_6_12",
    "vhost_net::guests_talk_over_netd",
    "vhost_net::guests_talk_over_testpmd",
    "vhost::pauses_without_a_daemon",
    "vhost::requests_fail_when_told_so",
    "vhost::blkd::a_stopped_daemon_stalls_its_disk_only",
    "vhost::blkd::pauses_without_a_daemon",
    "vhost::blkd::grows_and_refuses_another_disk",
    "vhost::blkd::requests_fail_when_told_so",
    "vhost_fs::files_are_shared_with_linux_6_1",
    "payload::vhost::blk_runs_several_queues",
    "payload::vhost::blk_survives_resets_and_pauses",
    "payload::vhost::blk_needs_a_daemon_to_start",
    "payload::vhost::a_stopped_daemon_stalls_its_disk_only",
    "payload::vhost::another_disk_is_refused",
    "payload::vhost::blkd::blk_reads_and_writes",
    "payload::vhost::blkd::blk_runs_several_queues",
    "payload::vhost::blkd::blk_describes_the_daemons_disk",
    "payload::vhost::blkd::blk_survives_resets_and_pauses",
    "payload::vhost::blkd::limits_change_while_it_runs",
    "payload::vhost::blkd::another_process_goes_on",
    "payload::vhost::blkd::one_vm_has_a_disk",
    "payload::vhost::blkd::pauses_and_ends_without_a_daemon",
    "payload::vhost::blkd::blk_grows_while_it_runs",
    "payload::vhost::blkd::a_stopped_daemon_stalls_its_disk_only",
    "payload::vhost::blkd::requests_fail_when_told_so",
    "payload::vhost::blkd::another_disk_is_refused",
    "payload::vhost::generic::qemus_daemon_serves_one",
    "payload::vhost::generic::blkd_serves_one",
    "payload::vhost::generic::blkd_serves_one_behind_the_relay",
    "payload::vhost_net::netd_may_die_behind_the_relay",
    "payload::vhost_net::ovs::moves_frames",
    "payload::vhost_net::ovs::serves_several_pairs",
    "payload::vhost_net::ovs::may_die",
    "payload::netd::a_card_leads_to_the_wire",
    "payload::netd::a_wire_carries_tags_and_segments",
    "payload::netd::ends_well_with_a_tap",
    "payload::passt::a_guest_has_an_address_and_sockets",
    "payload::passt::it_may_die",
    "payload::virtio_mem::a_guest_may_stand_still",
    "payload::dimms::a_guest_may_be_late",
    "payload::hotplug::a_guest_may_be_late",
    "payload::plug::a_guest_may_be_late",
    "payload::snapshot::flag::it_goes_on_at_once",
    "payload::snapshot::flag::it_stays_paused_for_whoever_resumes_it",
    "payload::snapshot::flag::what_is_wrong_is_told",
    "payload::snapshot::elsewhere::another_tap",
    "payload::snapshot::elsewhere::a_tap_that_a_client_opened",
    "payload::snapshot::elsewhere::another_console",
    "payload::snapshot::killed::it_is_whole_or_none",
    "payload::snapshot::killed::a_full_disk_leaves_nothing",
    "payload::snapshot::on_demand::it_comes_when_it_is_touched",
    "payload::snapshot::on_demand::what_is_given_back_is_zeroes",
    "payload::snapshot::on_demand::it_comes_under_load",
    "payload::snapshot::on_demand::a_snapshot_of_it_is_whole",
    "payload::snapshot::on_demand::what_is_damaged_ends_the_guest",
    "payload::snapshot::on_demand::what_does_not_go_with_it_is_refused",
    "payload::snapshot::vhost::disk_of_qemus",
    "payload::snapshot::vhost::disk",
    "payload::snapshot::vhost::disk_behind_the_relay",
    "payload::snapshot::vhost::requests_of_a_killed_one_of_qemus",
    "payload::snapshot::vhost::requests_of_a_killed_one",
    "payload::snapshot::vhost::requests_of_one_that_hangs",
    "payload::snapshot::vhost::interfaces",
    "payload::snapshot::vhost::interfaces_behind_the_relay",
    "payload::snapshot::vhost_fs::files",
    "payload::snapshot::vhost_fs::files_of_a_daemon_that_is_gone",
    "numa::linux_6_12_has_two_nodes_that_grow",
    "payload::zones::lie_one_behind_the_other",
    "payload::zones::go_around_the_hole",
    "payload::zones::and_nodes_are_told_to_the_guest",
    "payload::zones::are_resized_side_by_side",
    "payload::zones::what_cannot_be_is_refused",
    "payload::zones::come_back_after_a_reset",
    "payload::zones::are_reached_by_disks_and_daemons",
    "payload::zones::go_on_from_a_snapshot",
    "payload::migration::a_guest_that_writes_is_moved",
    "payload::migration::a_paused_guest_arrives_paused",
    "payload::migration::check::a_guest_that_would_go_is_not_moved",
    "payload::migration::check::a_lock_of_somebody_else_is_in_the_way",
    "payload::migration::check::all_that_is_in_the_way_is_told",
    "payload::migration::check::who_cannot_be_asked_is_told",
    "payload::migration::ends::a_guest_that_powers_off_is_off",
    "payload::migration::ends::a_guest_that_resets_stays",
    "payload::migration::ends::a_vmm_that_ends_ends_the_migration",
    "payload::migration::goes_on_by_every_connection",
    "payload::migration::kills::a_cancel_at_any_moment_leaves_the_guest_unharmed",
    "payload::migration::kills::at_most_one_guest_runs_whoever_dies",
    "payload::migration::kills::a_cancel_of_a_local_one_leaves_the_guest_unharmed",
    "payload::migration::kills::at_most_one_guest_runs_whoever_dies_of_a_local_one",
    "payload::migration::limits::a_guest_that_stays_is_as_fast_as_before",
    "payload::migration::limits::a_guest_that_writes_too_fast_is_slowed_down",
    "payload::migration::limits::a_guest_that_writes_too_fast_stays",
    "payload::migration::limits::the_bandwidth_is_kept_and_can_be_changed",
    "payload::migration::limits::what_happens_is_told",
    "payload::migration::local::memory_is_handed_over",
    "payload::migration::local::what_came_while_it_ran_is_handed_over",
    "payload::migration::local::memory_devices_are_handed_over",
    "payload::migration::local::zones_are_handed_over_and_one_that_is_private_is_named",
    "payload::migration::local::a_paused_guest_arrives_paused",
    "payload::migration::local::what_cannot_be_handed_over_is_refused",
    "payload::migration::local::a_destination_that_fails_changes_nothing",
    "payload::migration::local::it_is_asked_for_before",
    "payload::migration::memory_that_was_given_back_is_empty",
    "payload::migration::post_copy::what_does_not_converge_ends_in_post_copy",
    "payload::migration::post_copy::memory_comes_when_it_is_touched",
    "payload::migration::post_copy::memory_given_back_meanwhile_is_empty",
    "payload::migration::post_copy::a_connection_that_is_cut_is_made_anew",
    "payload::migration::post_copy::a_destination_that_dies_loses_the_guest",
    "payload::migration::post_copy::a_vmm_whose_guest_waits_for_memory_ends_when_told",
    "payload::migration::post_copy::who_did_not_allow_it_is_refused",
    "payload::migration::refusals::a_destination_without_the_disk_refuses",
    "payload::migration::refusals::garbage_is_no_guest",
    "payload::migration::refusals::what_does_not_fit_is_refused",
    "payload::migration::refusals::what_would_get_in_its_way_is_refused",
    "payload::migration::shared_memory_is_moved",
    "payload::migration::tls::nobody_else_gets_the_guest",
    "payload::migration::what_came_while_it_ran_is_there",
    // Devices of the host: on AMD or Hygon, or not seen often enough.
    "vfio::nvme_data_matches_on_linux_6_1",
    "vfio::a_restarted_guest_has_its_disk_again",
    "vfio::a_paused_guest_loses_its_disk",
    "vfio::nvme_comes_and_goes_under_linux_6_1",
    "vfio::nvme_reaches_memory_that_came",
    "vfio::a_disk_that_works_never_leaves_the_guest",
    "payload::migration::vhost::a_disk_that_somebody_has_stays",
    "payload::migration::vhost::another_daemon_is_refused_by_name",
    "payload::migration::vhost::disk",
    "payload::migration::vhost::disk_behind_the_relay",
    "payload::migration::vhost::disk_of_a_daemon_of_its_own",
    "payload::migration::vhost::disk_of_qemus",
    "payload::migration::vhost::killed_daemons",
    "payload::migration::vhost::killed_daemons_of_qemus",
    "payload::migration::vhost::local_disk",
    "payload::migration::vhost::local_disk_behind_the_relay",
    "payload::migration::vhost::local_disk_of_qemus",
    "payload::migration::vhost::what_a_daemon_of_qemus_wrote_is_moved",
    "payload::migration::vhost::what_a_daemon_wrote_before_it_was_killed_is_moved",
    "payload::migration::vhost::what_a_daemon_wrote_behind_the_relay_is_moved",
    "payload::migration::vhost::what_a_daemon_wrote_is_moved",
    "payload::migration::announced::by_the_vmm",
    "payload::migration::announced::by_netd",
    "payload::migration::vhost_net::netd",
    "payload::migration::vhost_net::netd_behind_the_relay",
    "payload::migration::vhost_net::netd_with_two_queue_pairs",
    "payload::migration::vhost_net::testpmd",
    "payload::snapshot::incremental::a_failed_one_loses_nothing",
    "payload::snapshot::incremental::a_killed_one_is_whole_or_none",
    "payload::snapshot::incremental::a_restored_guest_goes_on_with_it",
    "payload::snapshot::incremental::it_has_what_was_written",
    "payload::snapshot::incremental::memory_comes_and_goes_in_between",
    "payload::snapshot::incremental::memory_devices_take_each_others_place",
    "payload::snapshot::incremental::vhost::daemons_write_unseen",
    "payload::snapshot::incremental::wrong_bases_are_refused",
];

/// A host and the tests it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Which host.
    pub kind: Kind,
    /// QEMU's CPU model, when it is not the usual one.
    cpu: Option<String>,
    /// Its kernel, when it is not the usual one.
    kernel: Option<Version>,
    /// The only tests to run; all when there are none.
    only: &'static [&'static str],
    /// Tests to leave out.
    without: &'static [&'static str],
}

impl Place {
    /// All tests on one host.
    pub fn all(kind: Kind, cpu: Option<String>, kernel: Option<Version>) -> Self {
        Self {
            kind,
            cpu,
            kernel,
            only: &[],
            without: &[],
        }
    }

    /// The hosts of a run that names none; those first whose tests take longest, so that no processor is left waiting in the end.
    pub fn defaults() -> Vec<Self> {
        let mut kinds = Kind::defaults();
        kinds.sort_by_key(|kind| *kind != Kind::Arm);
        let second = kinds.contains(&Kind::Arm).then(Self::second_arm);
        let places = kinds.into_iter().map(|kind| Self {
            without: match kind {
                Kind::Hygon => &NOT_ON_HYGON,
                Kind::Arm => &NOT_ON_ARM,
                Kind::Amd => &NOT_ON_AMD,
                Kind::Native => &[],
            },
            ..Self::all(kind, None, None)
        });
        places.chain(second).collect()
    }

    /// A host without VHE whose KVM leaves the start of vCPUs to the VMM; the usual one has VHE and does not.
    fn second_arm() -> Self {
        Self {
            only: &SECOND_ARM,
            ..Self::all(Kind::Arm, Some("cortex-a72".into()), Some(Version::V6_12))
        }
    }

    /// Whether tests with the payload guest run here: on what is not this machine's architecture, since they cannot run beside it, and on
    /// any emulated ARM machine, so that there they are the same everywhere.
    pub fn has_payload(&self) -> bool {
        let arch = self.kind.arch();
        arch != Arch::native() || self.kind == Kind::Arm
    }

    /// Those of `tests` that are for this host.
    ///
    /// # Errors
    /// One that is named for this host is not among them.
    pub fn select(&self, tests: Vec<String>) -> Result<Vec<String>> {
        for name in self.only.iter().chain(self.without) {
            ensure!(tests.iter().any(|test| test == name), "{self}: there is no test {name}");
        }
        let wanted = |test: &str| self.only.is_empty() || self.only.contains(&test);
        let here = |test: &String| wanted(test) && !self.without.contains(&test.as_str());
        Ok(tests.into_iter().filter(here).collect())
    }

    /// The host's processor and kernel.
    pub fn options(&self) -> Options {
        let usual = Options::default();
        Options {
            cpu: self.cpu.clone(),
            kernel: self.kernel.unwrap_or(usual.kernel),
            ..usual
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nested::{}", self.kind)?;
        let other = [self.cpu.clone(), self.kernel.map(|kernel| kernel.to_string())];
        let other: Vec<_> = other.into_iter().flatten().collect();
        match other[..] {
            [] => Ok(()),
            _ => write!(f, "({})", other.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_named_after_what_is_unusual() {
        assert_eq!(Place::all(Kind::Amd, None, None).to_string(), "nested::amd");
        assert_eq!(Place::second_arm().to_string(), "nested::arm(cortex-a72,6.12)");
        assert_eq!(Place::second_arm().options().kernel, Version::V6_12);
    }

    #[test]
    fn a_run_of_all_hosts_leaves_out_what_another_one_has_seen() {
        let hygon = Place::defaults().into_iter().find(|place| place.kind == Kind::Hygon);
        let Some(hygon) = hygon else {
            eprintln!("this machine is the host: nothing is left out");
            return;
        };
        let tests: Vec<String> = NOT_ON_HYGON
            .iter()
            .chain(&["boot::x"])
            .map(|&name| name.to_owned())
            .collect();
        assert_eq!(hygon.select(tests.clone()).unwrap(), ["boot::x"]);
        assert_eq!(
            Place::all(Kind::Hygon, None, None).select(tests.clone()).unwrap(),
            tests
        );
        let error = hygon.select(vec!["boot::x".into()]).unwrap_err();
        assert!(error.to_string().contains(NOT_ON_HYGON[0]), "{error}");
    }

    #[test]
    fn only_the_second_host_of_a_kind_has_fewer_tests() {
        let mut tests: Vec<String> = SECOND_ARM.map(str::to_owned).to_vec();
        tests.push("power::ten_reboots".into());
        let select = |place: Place| place.select(tests.clone()).unwrap();
        assert_eq!(select(Place::all(Kind::Arm, None, None)), tests);
        assert_eq!(select(Place::second_arm()), SECOND_ARM);
        let error = Place::second_arm()
            .select(vec!["power::ten_reboots".into()])
            .unwrap_err();
        assert!(error.to_string().contains(SECOND_ARM[0]), "{error}");
    }
}
