//! MSI-X through the BAR, the ISR register and NEEDS_RESET.

use super::*;
use crate::{RingFault, VirtioInterrupt};

fn interrupt(guest: &Guest) -> Arc<dyn VirtioInterrupt> {
    guest.log().context.as_ref().expect("active").interrupt.clone()
}

#[test]
fn a_masked_vector_is_pending_until_unmasked() {
    let guest = Guest::new(1);
    guest.start();
    let vector = guest.vectors()[1].clone();
    guest.put(guest.table + 16 + 12, 4, 1);
    guest.offer(0);
    guest.serve(0);
    assert_eq!(vector.message(), None);
    assert_eq!(guest.get(guest.pending, 8), 0b10);
    guest.put(guest.table + 16 + 12, 4, 0);
    assert_eq!(vector.message().map(|m| m.data), Some(0x41));
    assert_eq!(guest.get(guest.pending, 8), 0);
    assert_eq!(vector.take(), 1);
    guest.set_config(guest.msix + 2, 2, 0xc000);
    assert_eq!(vector.message(), None, "function mask");
    guest.set_config(guest.msix + 2, 2, 0x8000);
    assert!(vector.message().is_some());
}

#[test]
fn a_queue_without_a_vector_raises_nothing() {
    let guest = Guest::new(1);
    guest.start();
    guest.put(guest.common + 0x16, 2, 0);
    guest.put(guest.common + 0x1a, 2, 0xffff);
    guest.offer(0);
    assert_eq!(guest.serve(0), 1);
    assert!(guest.vectors().iter().all(|v| v.take() == 0));
    assert_eq!(guest.get(guest.isr, 1), 0);
    assert!(interrupt(&guest).queue_event(0).is_none());
    guest.put(guest.common + 0x1a, 2, 1);
    let event = interrupt(&guest).queue_event(0).expect("event");
    event.write(5).expect("write");
    assert_eq!(guest.vectors()[1].take(), 5, "the same event");
}

#[test]
fn a_device_hears_of_other_interrupts() {
    let guest = Guest::new(1);
    let told = |guest: &Guest| guest.calls() == [Call::Interrupts];
    guest.start();
    assert_eq!(guest.calls(), [], "before it works there is nobody to tell");
    guest.put(guest.common + 0x16, 2, 0);
    guest.put(guest.common + 0x1a, 2, 0);
    assert!(told(&guest));
    assert!(interrupt(&guest).queue_event(0).is_some());
    guest.set_config(guest.msix + 2, 2, 0);
    assert!(told(&guest));
    assert!(interrupt(&guest).queue_event(0).is_none(), "nobody would hear it");
    guest.set_config(guest.msix + 2, 2, 0xc000);
    assert!(told(&guest));
    // A mask holds the event back where it is.
    guest.set_config(guest.msix + 2, 2, 0x8000);
    assert_eq!(guest.calls(), []);
}

#[test]
fn without_msix_the_isr_can_be_polled() {
    let guest = Guest::new(1);
    guest.start();
    guest.set_config(guest.msix + 2, 2, 0);
    guest.offer(0);
    guest.serve(0);
    assert_eq!(guest.get(guest.isr, 1), 1);
    assert_eq!(guest.get(guest.isr, 1), 0, "reading clears it");
    interrupt(&guest).config().expect("config");
    assert_eq!(guest.get(guest.isr, 1), 2);
    assert!(guest.vectors().iter().all(|v| v.take() == 0));
}

#[test]
fn a_configuration_change_shows_in_the_generation() {
    let guest = Guest::new(1);
    guest.start();
    let before = guest.get(guest.common + 0x15, 1);
    let raise = interrupt(&guest);
    guest.function.with_device(|_| raise.config()).expect("config");
    assert_eq!(guest.get(guest.common + 0x15, 1), (before + 1) & 0xff);
    assert_eq!(guest.vectors()[0].take(), 1);
    assert_eq!(guest.get(guest.isr, 1), 2);
}

#[test]
fn a_broken_ring_needs_a_reset_and_says_so_once() {
    let guest = Guest::new(1);
    guest.start();
    guest
        .log()
        .queues
        .get_mut(&0)
        .expect("queue")
        .fault(&RingFault::AvailIndex);
    assert_eq!(guest.status(), 15 | 64);
    assert_eq!(guest.vectors()[0].take(), 1);
    interrupt(&guest).needs_reset();
    assert_eq!(guest.vectors()[0].take(), 0);
    guest.set_status(15);
    assert_eq!(guest.status(), 15 | 64, "only a reset clears it");
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
    guest.start();
}

#[test]
fn rings_outside_of_memory_need_a_reset_of_this_device_only() {
    let guest = Guest::new(2);
    guest.negotiate(feature::VERSION_1);
    guest.put(guest.common + 0x10, 2, 0);
    guest.unmask(0);
    guest.set_up(1);
    guest.put(guest.common + 0x16, 2, 0);
    guest.put(guest.common + 0x30, 8, 0xffff_ffff_ffff_fffc);
    guest.put(guest.common + 0x1c, 2, 1);
    guest.calls();
    guest.set_status(15);
    assert_eq!(guest.status(), 15 | 64);
    assert_eq!(guest.calls(), [Call::Activate(feature::VERSION_1)]);
    assert_eq!(guest.vectors()[0].take(), 1);
    guest.start();
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let guest = Guest::new(1);
    guest.log().refuse_activation = true;
    guest.negotiate(feature::VERSION_1);
    guest.set_up(0);
    guest.calls();
    guest.set_status(15);
    assert_eq!(guest.status(), 15 | 64);
    assert_eq!(guest.calls(), [Call::Activate(feature::VERSION_1)]);
    guest.set_status(0);
    assert_eq!(guest.calls(), [Call::Reset]);
    guest.log().refuse_activation = false;
    guest.start();
}

#[test]
fn a_queue_the_device_refuses_or_loses_needs_a_reset() {
    let guest = Guest::new(2);
    guest.log().refuse_queues = true;
    guest.negotiate(feature::VERSION_1);
    guest.set_up(0);
    guest.set_up(1);
    guest.calls();
    guest.set_status(15);
    assert_eq!(guest.status(), 15 | 64);
    assert_eq!(guest.calls(), [Call::Activate(feature::VERSION_1), Call::Start(0)]);
    assert!(guest.doorbells().is_empty());
    guest.log().refuse_queues = false;
    guest.start();
    guest.log().lose_queues = true;
    guest.function.pause();
    assert_eq!(guest.status(), 15 | 64);
    guest.function.resume();
    assert_eq!(guest.calls(), [Call::Stop(0), Call::Stop(1)], "nothing to give back");
}

#[test]
fn the_event_index_is_used_when_agreed_on() {
    for (features, raised) in [(OFFERED, 0), (OFFERED & !feature::EVENT_IDX, 1)] {
        let guest = Guest::new(1);
        guest.negotiate(features);
        guest.set_up(0);
        guest.unmask(1);
        guest.set_status(15);
        let ram = guest.machine.memory.memory();
        // "Only after the fifth": used_event, behind the eight entries.
        ram.write_obj(4u16, GuestAddress(ring(0) + 0x1000 + 4 + 16))
            .expect("used_event");
        guest.offer(0);
        assert_eq!(guest.serve(0), 1);
        assert_eq!(guest.vectors()[0].take(), raised);
    }
}
