//! Targets and guests of all kinds, against the device that both use.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use triarch_device_core::BusDevice;
use triarch_legacy::CpuHotplugConfig;

use super::*;

const MAX: u32 = 5;
const FIXED: u32 = 1;

/// Host and guest: the host keeps to [`Sizing`], the guest to the registers.
struct World {
    cpus: CpuHotplug,
    known: Vec<CpuSlot>,
    open: Option<Sizing>,
    /// Processors the guest has brought online.
    online: BTreeSet<u32>,
    /// Processors the host lets run.
    plugged: BTreeSet<u32>,
}

impl World {
    fn new(boot: u32) -> Self {
        let config = CpuHotplugConfig {
            max: MAX,
            present: boot,
            fixed: FIXED,
            absent: 0,
        };
        let cpus = CpuHotplug::new(config, None, || {});
        Self {
            known: cpus.slots(),
            cpus,
            open: None,
            online: (0..boot).collect(),
            plugged: (0..boot).collect(),
        }
    }

    /// Asks for `target` as a client would; false when it has to wait.
    fn resize(&mut self, target: u32) -> bool {
        self.look();
        match &self.open {
            Some(open) if open.target == target => return true,
            Some(open) if !open.going.waiting.is_empty() => return false,
            _ => {}
        }
        let mut sizing = Sizing::plan(&self.known, target);
        self.open = None;
        if !sizing.is_empty() {
            self.plugged.extend(&sizing.added);
            sizing.ask(&self.cpus);
            self.open = Some(sizing);
            self.look();
        }
        true
    }

    fn look(&mut self) {
        let slots = self.cpus.slots();
        for one in news(&self.known, &slots) {
            if let News::Gone(index) = one {
                assert!(self.plugged.remove(&index), "vCPU {index} went twice");
            }
            if let Some(open) = &mut self.open {
                open.hear(&one);
            }
        }
        self.known = slots;
        if self.open.as_ref().is_some_and(Sizing::is_over) {
            self.open = None;
        }
    }

    fn time_out(&mut self) {
        if let Some(open) = self.open.take() {
            open.going.waiting.iter().for_each(|index| self.cpus.leave(*index));
        }
        self.look();
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.cpus.read(offset, &mut data).expect("a register");
        u32::from_le_bytes(data)
    }

    fn write(&self, index: u32, register: u64, value: u32) {
        let at = 0x10 * (u64::from(index) + 1) + register;
        self.cpus.write(at, &value.to_le_bytes()).expect("a register");
    }

    /// The guest starts a processor, which works if the host lets it run.
    fn start(&mut self, index: u32) {
        if self.plugged.contains(&index) && self.online.insert(index) {
            self.cpus.started(index);
        }
    }

    fn eject(&mut self, index: u32) {
        self.online.remove(&index);
        self.write(index, 0x4, 1);
    }

    /// The guest takes one notice and obeys, refuses or forgets it; false when there was none.
    fn serve(&mut self, manner: u8) -> bool {
        let notice = self.read(0x4);
        let (index, value) = (notice >> 8, notice & 0xff);
        match (value, manner) {
            (0, _) => return false,
            (_, 1) => {
                self.write(index, 0x8, value);
                self.write(index, 0xc, 0x82);
            }
            (_, 2) => {}
            (1, _) if self.read(0x10 * (u64::from(index) + 1)) == 0xf => self.start(index),
            (1, _) => panic!("vCPU {index} was announced and is not there"),
            _ => self.eject(index),
        }
        self.look();
        true
    }

    fn check(&self) {
        let present: BTreeSet<u32> = (0..MAX).filter(|n| self.known[*n as usize].present).collect();
        assert_eq!(present, self.plugged, "what the guest has may run, and nothing else");
        assert!((0..FIXED).all(|n| present.contains(&n)));
        let started: BTreeSet<u32> = (0..MAX).filter(|n| self.known[*n as usize].started).collect();
        assert_eq!(started, self.online, "what is told to be started is");
        if let Some(open) = &self.open {
            let late = Sizing::plan(&self.known, open.target);
            assert!(!open.is_over() && (FIXED..=MAX).contains(&late.target));
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Resize(u32),
    Serve(u8),
    Start(u32),
    Eject(u32),
    TimeOut,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (FIXED..=MAX).prop_map(Step::Resize),
        (0u8..4).prop_map(Step::Serve),
        (0..MAX).prop_map(Step::Start),
        (0..MAX).prop_map(Step::Eject),
        Just(Step::TimeOut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever was asked and answered before: once the guest does what it is told, it has what was asked for last.
    #[test]
    fn a_guest_that_obeys_gets_to_the_last_target(
        boot in FIXED..=MAX,
        steps in proptest::collection::vec(step(), 0..60),
        target in FIXED..=MAX,
    ) {
        let mut world = World::new(boot);
        for step in steps {
            match step {
                Step::Resize(target) => drop(world.resize(target)),
                Step::Serve(manner) => drop(world.serve(manner)),
                Step::Start(index) => world.start(index),
                Step::Eject(index) if index >= FIXED => world.eject(index),
                Step::Eject(index) => world.write(index, 0x4, 1),
                Step::TimeOut => world.time_out(),
            }
            world.look();
            world.check();
        }
        while world.serve(0) {}
        world.time_out();
        prop_assert!(world.resize(target), "nothing is open");
        while world.serve(0) {}
        world.check();
        prop_assert!(world.open.is_none());
        prop_assert_eq!(world.plugged.len() as u32, target);
        prop_assert_eq!(world.online.len() as u32, target);
    }
}

#[test]
fn the_lowest_come_and_the_idle_go_first() {
    let mut world = World::new(2);
    let plan = Sizing::plan(&world.known, 4);
    assert_eq!(
        (plan.added, plan.coming.waiting, plan.going.waiting),
        (vec![2, 3], vec![2, 3], vec![])
    );
    world.resize(4);
    // The guest hears of both and starts the upper one only.
    world.read(0x4);
    world.read(0x4);
    world.start(3);
    world.look();
    assert_eq!(Sizing::plan(&world.known, 3).going.waiting, [2]);
    let again = Sizing::plan(&world.known, 4);
    assert_eq!((again.added, again.coming.waiting), (vec![], vec![2]));
    assert!(Sizing::plan(&World::new(3).known, 3).is_empty());
}

#[test]
fn a_target_below_what_was_never_started_waits_for_the_rest() {
    let mut world = World::new(1);
    world.resize(5);
    // The guest hears of the first of them only.
    world.read(0x4);
    assert!(world.resize(3));
    let open = world.open.clone().expect("two have not started");
    assert_eq!((open.withdrawn.as_slice(), open.is_over()), ([3, 4].as_slice(), false));
    assert_eq!(
        (open.coming.waiting.as_slice(), open.going.waiting.len()),
        ([1, 2].as_slice(), 0)
    );
    assert_eq!(
        (open.total(), open.done(), open.phase()),
        (4, 2, "the guest has to start vCPUs")
    );
    while world.serve(0) {}
    assert!(world.open.is_none() && world.online.len() == 3);
    // One that it knows of has to be asked for, and then both are waited for.
    world.resize(5);
    world.read(0x4);
    world.read(0x4);
    world.resize(4);
    let mut open = world.open.clone().expect("nothing has happened");
    assert_eq!(open.phase(), "the guest has to give back vCPUs and to start others");
    assert!(!world.resize(5), "not while the guest may give it back");
    open.hear(&News::Gone(4));
    assert_eq!((open.is_over(), open.phase()), (false, "the guest has to start vCPUs"));
    open.hear(&News::Started(3));
    assert_eq!(
        (open.is_over(), &*open.outcome()),
        (true, "the guest gave back vCPU 4; the guest started vCPU 3")
    );
}

#[test]
fn what_comes_of_it_is_told_in_words() {
    let mut sizing = Sizing::plan(&World::new(1).known, 4);
    assert_eq!(sizing.outcome(), "the guest started none");
    sizing.hear(&News::Started(2));
    sizing.hear(&News::Started(2));
    sizing.hear(&News::Refused(1, 0x82));
    assert_eq!((sizing.total(), sizing.coming.waiting.as_slice()), (3, [3].as_slice()));
    assert_eq!(sizing.outcome(), "the guest started vCPU 2");
    let failure = sizing.failure().expect("a refusal");
    let refusal = "the guest does not take vCPU 1 (busy, _OST status 0x82)";
    assert!(failure.starts_with(&format!("{refusal}: Linux needs")), "{failure}");
    let world = World::new(1);
    let late = sizing.late(&world.known, Duration::from_secs(30));
    let begin = "the guest has vCPU 3 and did not bring it online within 30 s";
    assert!(
        late.starts_with(begin) && late.ends_with(&format!("; {refusal}")),
        "{late}"
    );

    let mut world = World::new(4);
    let mut sizing = Sizing::plan(&world.known, 2);
    sizing.ask(&world.cpus);
    world.look();
    assert_eq!(sizing.outcome(), "the guest gave back none");
    let late = sizing.late(&world.known, Duration::from_secs(30));
    assert_eq!(
        late,
        "the guest did not hear within 30 s that it should give back vCPUs 3, 2"
    );
    sizing.hear(&News::Refused(3, 1));
    sizing.hear(&News::Gone(2));
    assert_eq!(sizing.outcome(), "the guest gave back vCPU 2");
    let failure = sizing.failure().expect("a refusal");
    assert_eq!(
        failure,
        "the guest does not give back vCPU 3 (failure, _OST status 0x1)"
    );
    sizing.withdrawn = vec![5, 6];
    let outcome = "vCPUs 5, 6 were taken back before the guest saw them; the guest gave back vCPU 2";
    assert_eq!(sizing.outcome(), outcome);
}

#[test]
fn sizes_are_counted_whole() {
    let (meters, world) = (CpuMeters::default(), World::new(3));
    let mut sizing = Sizing::plan(&world.known, 1);
    sizing.withdrawn = vec![4];
    sizing.hear(&News::Gone(2));
    count_all(&meters, &sizing, Outcome::Replaced);
    let counted: Vec<_> = meters.changes().into_iter().filter(|change| change.2 > 0).collect();
    assert_eq!(counted, [("remove", "done", 2), ("remove", "replaced", 1)]);
}
