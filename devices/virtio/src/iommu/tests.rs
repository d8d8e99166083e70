use std::collections::BTreeMap;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::domains::{Blocked, Domains, Reason, access};
use super::request::{Request, Status};
use super::*;
use crate::Segment;
use crate::mock::{Desc, FakeDriver, MEMORY};

mod requests;
mod shadows;

const RW: u32 = access::READ | access::WRITE;

fn mapping(first: u64, last: u64, phys: u64, flags: u32) -> IommuMappingV1 {
    IommuMappingV1 {
        first,
        last,
        phys,
        flags,
    }
}

fn with(endpoints: &[u32]) -> Domains {
    let mut domains = Domains::new();
    add(&mut domains, endpoints);
    domains
}

fn add(domains: &mut Domains, endpoints: &[u32]) {
    for endpoint in endpoints {
        domains.add(*endpoint, None).expect("nothing follows");
    }
}

/// Where one byte is.
fn at(domains: &Domains, endpoint: u32, addr: u64, write: bool) -> Result<u64, Reason> {
    match domains.translate(endpoint, addr, 1, write, 1) {
        Ok(pieces) => Ok(pieces.expect("one piece")[0].addr.0),
        Err(Blocked { reason, address }) => {
            assert_eq!(address, addr);
            Err(reason)
        }
    }
}

#[test]
fn who_is_in_no_domain_reaches_all_or_nothing() {
    let mut domains = with(&[8]);
    assert_eq!(at(&domains, 8, 0x1234, true), Ok(0x1234));
    domains.set_strict(true);
    assert_eq!(at(&domains, 8, 0x1234, true), Err(Reason::Domain));
    domains.set_strict(false);
    domains.set_bypass(false);
    assert_eq!(at(&domains, 8, 0x1234, true), Err(Reason::Domain));
    // A domain may reach all memory, too.
    assert_eq!(domains.attach(8, 1, true), Ok(()));
    assert_eq!(at(&domains, 8, 0x1234, true), Ok(0x1234));
    assert_eq!(domains.map(1, &mapping(0, 0xfff, 0, RW)), Err(Status::Invalid));
    assert_eq!(domains.unmap(1, 0, 0xfff), Err(Status::Invalid));
}

#[test]
fn endpoints_come_and_go_between_domains() {
    let mut domains = with(&[8, 16]);
    assert_eq!(domains.attach(24, 1, false), Err(Status::NoEntry));
    assert_eq!(domains.attach(8, LAST_DOMAIN + 1, false), Err(Status::Range));
    assert_eq!(domains.attach(8, 1, false), Ok(()));
    assert_eq!(domains.attach(8, 1, false), Ok(()));
    assert_eq!(domains.attach(16, 1, true), Err(Status::Invalid));
    assert_eq!(domains.attach(16, 1, false), Ok(()));
    assert_eq!(domains.map(1, &mapping(0x1000, 0x1fff, 0x8000, RW)), Ok(()));
    assert_eq!(
        (at(&domains, 8, 0x1001, true), at(&domains, 16, 0x1fff, false)),
        (Ok(0x8001), Ok(0x8fff))
    );
    // To another domain: that is a detach from the first one.
    assert_eq!(domains.attach(8, 2, false), Ok(()));
    assert_eq!(at(&domains, 8, 0x1001, true), Err(Reason::Mapping));
    assert_eq!(domains.detach(8, 1), Err(Status::Invalid));
    assert_eq!(domains.detach(24, 1), Err(Status::NoEntry));
    assert_eq!(domains.count(), (2, 2, 1));
    // With its last endpoint a domain goes.
    assert_eq!(domains.detach(16, 1), Ok(()));
    assert_eq!(domains.count(), (2, 1, 0));
    assert_eq!(domains.map(1, &mapping(0, 0xfff, 0, RW)), Err(Status::NoEntry));
    // And with a device its place in a domain.
    domains.remove(8);
    assert_eq!(domains.count(), (1, 0, 0));
    add(&mut domains, &[8]);
    assert_eq!(at(&domains, 8, 0x1001, true), Ok(0x1001));
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let mut domains = with(&[8]);
    domains.attach(8, 1, false).expect("it is there");
    let mut map = |first, last, phys, flags| domains.map(1, &mapping(first, last, phys, flags));
    assert_eq!(map(0x1000, 0x2fff, 0x1_0000, RW), Ok(()));
    assert_eq!(map(0x2000, 0x3fff, 0x1_0000, RW), Err(Status::Invalid), "overlap");
    assert_eq!(map(0, u64::MAX, 0, RW), Err(Status::Range));
    assert_eq!(map(0x1_0000, LAST_ADDRESS + PAGE, 0, RW), Err(Status::Range));
    assert_eq!(map(0x1_0000, 0x1_0ffe, 0, RW), Err(Status::Range), "not whole pages");
    assert_eq!(map(0x1_0800, 0x1_17ff, 0, RW), Err(Status::Range), "not on a page");
    assert_eq!(map(0x1_0000, 0x1_0fff, 0x800, RW), Err(Status::Range), "not of a page");
    assert_eq!(
        map(0x1_0000, 0x1_1fff, u64::MAX - 0xfff, RW),
        Err(Status::Range),
        "wraps"
    );
    assert_eq!(map(0x2_0000, 0x1_0fff, 0, RW), Err(Status::Invalid), "backwards");
    assert_eq!(map(0x1_0000, 0x1_0fff, 0, 8), Err(Status::Invalid), "unknown flag");
    assert_eq!(domains.unmap(1, 0x1000, 0x1fff), Err(Status::Range), "cut behind");
    assert_eq!(domains.unmap(1, 0x2000, 0x2fff), Err(Status::Range), "cut before");
    assert_eq!(domains.unmap(1, 0x2000, 0x1fff), Err(Status::Invalid));
    assert_eq!(domains.unmap(2, 0, 0xfff), Err(Status::NoEntry));
    assert_eq!(domains.unmap(1, 0x8000, 0x8fff), Ok(()), "nothing there");
    assert_eq!(domains.unmap(1, 0, u64::MAX), Ok(()));
    assert_eq!(domains.count(), (1, 1, 0));
}

#[test]
fn mappings_are_limited_for_all_domains_together() {
    let mut domains = with(&[8, 16]);
    domains.attach(8, 1, false).expect("it is there");
    domains.attach(16, 2, false).expect("it is there");
    let page = |n: usize| n as u64 * PAGE;
    for n in 0..MAX_MAPPINGS {
        let done = domains.map(1 + (n & 1) as u32, &mapping(page(n), page(n) + PAGE - 1, 0, RW));
        assert_eq!(done, Ok(()));
    }
    let one_more = mapping(page(MAX_MAPPINGS), page(MAX_MAPPINGS) + PAGE - 1, 0, RW);
    assert_eq!(domains.map(1, &one_more), Err(Status::NoMemory));
    domains.detach(16, 2).expect("it is in there");
    assert_eq!(domains.map(1, &one_more), Ok(()));
}

#[test]
fn a_range_across_mappings_is_in_pieces() {
    let mut domains = with(&[8]);
    domains.attach(8, 1, false).expect("it is there");
    for (first, last, phys, flags) in [
        (0x1000, 0x1fff, 0x8000, RW),
        (0x2000, 0x2fff, 0x9000, RW),
        (0x3000, 0x3fff, 0x4000, RW),
        (0x4000, 0x4fff, 0x5000, access::READ),
    ] {
        domains.map(1, &mapping(first, last, phys, flags)).expect("mapped");
    }
    let pieces = |addr, len, write, max| domains.translate(8, addr, len, write, max);
    let found = pieces(0x1800, 0x2000, true, 2).expect("mapped").expect("two");
    let segment = |addr, len| Segment {
        addr: GuestAddress(addr),
        len,
    };
    assert_eq!(found[..], [segment(0x8800, 0x1800), segment(0x4000, 0x800)]);
    assert_eq!(pieces(0x1800, 0x2000, true, 1), Ok(None));
    let blocked = |address| {
        Err(Blocked {
            reason: Reason::Mapping,
            address,
        })
    };
    assert_eq!(pieces(0x3800, 0x1000, true, 9), blocked(0x4000), "read-only");
    assert!(pieces(0x3800, 0x1000, false, 9).is_ok());
    assert_eq!(pieces(0x4800, 0x1000, false, 9), blocked(0x5000));
    assert_eq!(pieces(u64::MAX, 4, false, 9), blocked(u64::MAX));
}

#[test]
fn what_was_saved_goes_on() {
    let mut domains = with(&[8, 16, 24]);
    domains.attach(8, 1, false).expect("it is there");
    domains.attach(16, 1, false).expect("it is there");
    domains.attach(24, 7, true).expect("it is there");
    domains.map(1, &mapping(0x1000, 0x1fff, 0x8000, RW)).expect("mapped");
    let saved = domains.save();
    let json = serde_json::to_string(&saved).expect("text");
    let saved: Vec<IommuDomainV1> = serde_json::from_str(&json).expect("domains");
    let mut next = Domains::new();
    next.restore(true, &saved).expect("as it was");
    // The devices come later.
    assert_eq!(next.detach(8, 1), Err(Status::NoEntry));
    add(&mut next, &[8, 16, 24]);
    assert_eq!(
        (at(&next, 16, 0x1004, true), at(&next, 24, 5, true)),
        (Ok(0x8004), Ok(5))
    );
    assert_eq!(next.save(), domains.save());
    let refused = |edit: fn(&mut Vec<IommuDomainV1>)| {
        let mut wrong = saved.clone();
        edit(&mut wrong);
        assert!(Domains::new().restore(true, &wrong).is_err());
    };
    refused(|all| all[1].endpoints = vec![8]);
    refused(|all| all[1].id = 1);
    refused(|all| all[1].id = LAST_DOMAIN + 1);
    refused(|all| all[1].endpoints.clear());
    refused(|all| all[0].endpoints.push(1 << 16));
    refused(|all| all[1].mappings = all[0].mappings.clone());
    refused(|all| {
        let twice = all[0].mappings[0];
        all[0].mappings.push(twice);
    });
}

#[derive(Debug, Clone)]
enum Step {
    Attach(u32, u32),
    Detach(u32, u32),
    Map(u32, u64, u64, u64, u32),
    Unmap(u32, u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let (endpoint, domain, page) = (0..3u32, 0..3u32, 0..12u64);
    prop_oneof![
        (endpoint.clone(), domain.clone()).prop_map(|(e, d)| Step::Attach(e, d)),
        (endpoint, domain.clone()).prop_map(|(e, d)| Step::Detach(e, d)),
        (domain.clone(), page.clone(), 1..4u64, page.clone(), 0..4u32)
            .prop_map(|(d, f, n, p, a)| Step::Map(d, f, n, p, a)),
        (domain, page, 1..12u64).prop_map(|(d, f, n)| Step::Unmap(d, f, n)),
    ]
}

/// Pages by their numbers: where the page is, for what, and which mapping it is of.
type Pages = BTreeMap<u64, (u64, u32, usize)>;

proptest! {
    /// Page by page, domains do what a table of pages does.
    #[test]
    fn domains_are_tables_of_pages(steps in proptest::collection::vec(step(), 1..60)) {
        let mut domains = with(&[0, 1, 2]);
        domains.set_bypass(false);
        let mut places: BTreeMap<u32, u32> = BTreeMap::new();
        let mut tables: BTreeMap<u32, Pages> = BTreeMap::new();
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Attach(endpoint, domain) => {
                    prop_assert_eq!(domains.attach(endpoint, domain, false), Ok(()));
                    places.insert(endpoint, domain);
                    tables.entry(domain).or_default();
                }
                Step::Detach(endpoint, domain) => {
                    let inside = places.get(&endpoint) == Some(&domain);
                    prop_assert_eq!(domains.detach(endpoint, domain).is_ok(), inside);
                    if inside {
                        places.remove(&endpoint);
                    }
                }
                Step::Map(domain, first, pages, phys, flags) => {
                    let made = domains.map(domain, &mapping(first * PAGE, (first + pages) * PAGE - 1, phys * PAGE, flags));
                    let table = tables.get_mut(&domain);
                    let free = table.as_ref().is_some_and(|table| (first..first + pages).all(|page| !table.contains_key(&page)));
                    prop_assert_eq!(made.is_ok(), free);
                    if let (Some(table), true) = (table, free) {
                        table.extend((0..pages).map(|i| (first + i, (phys + i, flags, n))));
                    }
                }
                Step::Unmap(domain, first, pages) => {
                    let done = domains.unmap(domain, first * PAGE, (first + pages) * PAGE - 1);
                    let Some(table) = tables.get_mut(&domain) else {
                        prop_assert_eq!(done, Err(Status::NoEntry));
                        continue;
                    };
                    let cut = |edge: u64| {
                        let of = |page: u64| table.get(&page).map(|(.., mapping)| *mapping);
                        edge > 0 && of(edge - 1).is_some() && of(edge - 1) == of(edge)
                    };
                    let whole = !cut(first) && !cut(first + pages);
                    prop_assert_eq!(done.is_ok(), whole);
                    if whole {
                        table.retain(|page, _| !(first..first + pages).contains(page));
                    }
                }
            }
            // A domain lives as long as somebody is in it.
            tables.retain(|domain, _| places.values().any(|place| place == domain));
            let total: usize = domains.save().iter().map(|domain| domain.mappings.len()).sum();
            prop_assert_eq!(domains.count(), (3, tables.len(), total));
            for endpoint in 0..3 {
                for page in 0..16 {
                    let table = places.get(&endpoint).and_then(|domain| tables.get(domain));
                    let found = table.and_then(|table| table.get(&page));
                    let read = found.filter(|(_, flags, _)| flags & access::READ != 0).map(|(phys, ..)| phys * PAGE);
                    prop_assert_eq!(at(&domains, endpoint, page * PAGE, false).ok(), read);
                }
            }
        }
    }
}
