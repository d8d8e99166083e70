//! Who may reach what: endpoints, domains, and the mappings of domains (virtio 1.2, 5.13.6). Nothing here knows queues or threads.

use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::request::Status;
use super::shadow::Shadow;
use crate::Segment;
use crate::dma::Pieces;
use vm_memory::GuestAddress;

/// Mappings of all domains together, so that no driver grows the VMM: some 8 MiB.
pub const MAX_MAPPINGS: usize = 1 << 17;
/// The last address that a driver may map.
pub const LAST_ADDRESS: u64 = (1 << 48) - 1;
/// The last number of a domain.
pub const LAST_DOMAIN: u32 = 0xffff;
/// Mappings begin and end at multiples of this.
pub const PAGE: u64 = 4096;

/// What a mapping allows (VIRTIO_IOMMU_MAP_F_*).
pub(super) mod access {
    pub(in super::super) const READ: u32 = 1;
    pub(in super::super) const WRITE: u32 = 2;
    pub(in super::super) const MMIO: u32 = 4;
    pub(in super::super) const ALL: u32 = READ | WRITE | MMIO;

    /// Whether a mapping with these flags can be written.
    pub(in super::super) fn can_write(flags: u32) -> bool {
        flags & WRITE != 0
    }
}

/// Addresses of a domain that are mapped, as they are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IommuMappingV1 {
    /// First address of the domain.
    pub first: u64,
    /// Last address of it.
    pub last: u64,
    /// GPA of the first.
    pub phys: u64,
    /// What is allowed.
    pub flags: u32,
}

/// A saved domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IommuDomainV1 {
    /// Its number.
    pub id: u32,
    /// Its endpoints reach all memory.
    pub bypass: bool,
    /// Endpoints in it.
    pub endpoints: Vec<u32>,
    /// Its mappings.
    pub mappings: Vec<IommuMappingV1>,
}

/// Why a device may not reach an address (VIRTIO_IOMMU_FAULT_R_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// The endpoint is in no domain.
    Domain = 1,
    /// Nothing is mapped there, or not for that.
    Mapping = 2,
}

/// A refused access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocked {
    pub(super) reason: Reason,
    /// The first address that is refused.
    pub(super) address: u64,
}

#[derive(Debug, Clone, Copy)]
struct Mapping {
    last: u64,
    phys: u64,
    flags: u32,
}

#[derive(Debug, Default)]
struct Domain {
    bypass: bool,
    endpoints: usize,
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Default)]
struct Place {
    /// There is such a device now.
    present: bool,
    domain: Option<u32>,
    /// What has to follow: the device reaches memory by itself.
    shadow: Option<Arc<dyn Shadow>>,
}

/// All endpoints and domains.
pub(super) struct Domains {
    /// Endpoints in no domain reach all memory.
    bypass: bool,
    /// Whatever `bypass` says they do not: the driver does not know of it.
    strict: bool,
    endpoints: BTreeMap<u32, Place>,
    domains: BTreeMap<u32, Domain>,
    mappings: usize,
}

type Done = Result<(), Status>;

impl Domains {
    /// No endpoints; all that come reach all memory until a driver says otherwise.
    pub(super) fn new() -> Self {
        Self {
            bypass: true,
            strict: false,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            mappings: 0,
        }
    }

    /// A device is there. If it has a `shadow`, that has followed when this returns.
    pub(super) fn add(&mut self, endpoint: u32, shadow: Option<Arc<dyn Shadow>>) -> io::Result<()> {
        let place = self.endpoints.entry(endpoint).or_default();
        place.present = true;
        place.shadow = shadow;
        self.follow(endpoint)
    }

    /// It is gone, and with it what was said of it.
    pub(super) fn remove(&mut self, endpoint: u32) {
        self.leave(endpoint);
        let place = self.endpoints.remove(&endpoint);
        if let Some(shadow) = place.and_then(|place| place.shadow) {
            shadow.reach_nothing();
        }
    }

    /// Endpoints in no domain reach all memory.
    pub(super) fn bypass(&self) -> bool {
        self.bypass
    }

    /// What they reach from now on.
    pub(super) fn set_bypass(&mut self, bypass: bool) {
        if std::mem::replace(&mut self.bypass, bypass) != bypass {
            self.follow_all();
        }
    }

    /// Whether they reach nothing in any case.
    pub(super) fn set_strict(&mut self, strict: bool) {
        if std::mem::replace(&mut self.strict, strict) != strict {
            self.follow_all();
        }
    }

    /// Whether there is such a device.
    pub(super) fn knows(&self, endpoint: u32) -> bool {
        self.endpoints.get(&endpoint).is_some_and(|place| place.present)
    }

    /// How many devices, domains and mappings there are.
    pub(super) fn count(&self) -> (usize, usize, usize) {
        let present = self.endpoints.values().filter(|place| place.present).count();
        (present, self.domains.len(), self.mappings)
    }

    /// The driver is gone: all domains are, too.
    pub(super) fn reset(&mut self) {
        self.clear();
        self.strict = false;
        self.follow_all();
    }

    fn clear(&mut self) {
        self.domains.clear();
        self.mappings = 0;
        self.endpoints.values_mut().for_each(|place| place.domain = None);
    }

    /// Whether endpoints in `domain` reach all memory; those in none if there is none.
    fn passes(&self, domain: Option<&Domain>) -> bool {
        domain.map_or(self.bypass && !self.strict, |domain| domain.bypass)
    }

    /// Has what shadows `endpoint` reach what that does. When it cannot, it reaches nothing.
    fn follow(&self, endpoint: u32) -> io::Result<()> {
        let Some(place) = self.endpoints.get(&endpoint) else {
            return Ok(());
        };
        let Some(shadow) = &place.shadow else { return Ok(()) };
        let domain = place.domain.and_then(|id| self.domains.get(&id));
        if self.passes(domain) {
            return shadow.reach_all();
        }
        shadow.reach_nothing();
        for (first, mapping) in domain.iter().flat_map(|domain| &domain.mappings) {
            if let Err(error) = shadow.map(*first..=mapping.last, mapping.phys, access::can_write(mapping.flags)) {
                shadow.reach_nothing();
                return Err(error);
            }
        }
        Ok(())
    }

    /// The same for all of them. Whoever cannot follow says so itself.
    fn follow_all(&self) {
        for endpoint in self.endpoints.keys() {
            let _ = self.follow(*endpoint);
        }
    }

    /// What shadows endpoints of `domain`.
    fn shadows(&self, domain: u32) -> impl Iterator<Item = &Arc<dyn Shadow>> {
        let inside = self
            .endpoints
            .values()
            .filter(move |place| place.domain == Some(domain));
        inside.filter_map(|place| place.shadow.as_ref())
    }

    /// What `endpoint` cannot be told to use.
    pub(super) fn gaps(&self, endpoint: u32) -> Vec<RangeInclusive<u64>> {
        let shadow = self.endpoints.get(&endpoint).and_then(|place| place.shadow.as_ref());
        shadow.map(|shadow| shadow.gaps()).unwrap_or_default()
    }

    /// ATTACH (5.13.6.3).
    pub(super) fn attach(&mut self, endpoint: u32, domain: u32, bypass: bool) -> Done {
        if domain > LAST_DOMAIN {
            return Err(Status::Range);
        }
        if !self.knows(endpoint) {
            return Err(Status::NoEntry);
        }
        match self.domains.get(&domain) {
            Some(there) if there.bypass != bypass => return Err(Status::Invalid),
            Some(_) if self.endpoints.get(&endpoint).and_then(|place| place.domain) == Some(domain) => return Ok(()),
            _ => {}
        }
        self.leave(endpoint);
        self.join(endpoint, domain, bypass);
        self.follow(endpoint).map_err(|error| {
            self.leave(endpoint);
            refused(&error)
        })
    }

    fn join(&mut self, endpoint: u32, domain: u32, bypass: bool) {
        let joined = self.domains.entry(domain).or_default();
        joined.bypass = bypass;
        joined.endpoints += 1;
        self.endpoints.entry(endpoint).or_default().domain = Some(domain);
    }

    /// DETACH (5.13.6.4).
    pub(super) fn detach(&mut self, endpoint: u32, domain: u32) -> Done {
        let place = self.endpoints.get(&endpoint).filter(|place| place.present);
        match place.ok_or(Status::NoEntry)?.domain {
            Some(there) if there == domain => {
                self.leave(endpoint);
                self.follow(endpoint).map_err(|error| refused(&error))
            }
            _ => Err(Status::Invalid),
        }
    }

    /// Takes an endpoint out of its domain. A domain without endpoints is gone, and so are its mappings.
    fn leave(&mut self, endpoint: u32) {
        let Some(id) = self.endpoints.get_mut(&endpoint).and_then(|place| place.domain.take()) else {
            return;
        };
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.endpoints -= 1;
            if domain.endpoints == 0 {
                self.mappings -= domain.mappings.len();
                self.domains.remove(&id);
            }
        }
    }

    /// MAP (5.13.6.5).
    pub(super) fn map(&mut self, domain: u32, mapping: &IommuMappingV1) -> Done {
        self.insert(domain, mapping)?;
        let iovas = mapping.first..=mapping.last;
        let writable = access::can_write(mapping.flags);
        let mapped = self
            .shadows(domain)
            .try_for_each(|shadow| shadow.map(iovas.clone(), mapping.phys, writable));
        if let Err(error) = mapped {
            self.shadows(domain).for_each(|shadow| shadow.unmap(iovas.clone()));
            if let Some(domain) = self.domains.get_mut(&domain) {
                domain.mappings.remove(&mapping.first);
                self.mappings -= 1;
            }
            return Err(refused(&error));
        }
        Ok(())
    }

    fn insert(&mut self, domain: u32, mapping: &IommuMappingV1) -> Done {
        let IommuMappingV1 {
            first,
            last,
            phys,
            flags,
        } = *mapping;
        if flags & !access::ALL != 0 {
            return Err(Status::Invalid);
        }
        let domain = self.domains.get_mut(&domain).ok_or(Status::NoEntry)?;
        if domain.bypass || first > last {
            return Err(Status::Invalid);
        }
        let aligned = [first, last.wrapping_add(1), phys]
            .iter()
            .all(|at| at.is_multiple_of(PAGE));
        if !aligned || last > LAST_ADDRESS || phys.checked_add(last - first).is_none() {
            return Err(Status::Range);
        }
        if overlaps(&domain.mappings, first, last) {
            return Err(Status::Invalid);
        }
        if self.mappings >= MAX_MAPPINGS {
            return Err(Status::NoMemory);
        }
        domain.mappings.insert(first, Mapping { last, phys, flags });
        self.mappings += 1;
        Ok(())
    }

    /// UNMAP (5.13.6.6): all mappings from `first` to `last`, none of which may be cut.
    pub(super) fn unmap(&mut self, id: u32, first: u64, last: u64) -> Done {
        let domain = self.domains.get_mut(&id).ok_or(Status::NoEntry)?;
        if domain.bypass || first > last {
            return Err(Status::Invalid);
        }
        let inside = domain.mappings.range(first..=last);
        let cut_behind = inside
            .clone()
            .next_back()
            .is_some_and(|(_, mapping)| mapping.last > last);
        let before = domain.mappings.range(..first).next_back();
        if cut_behind || before.is_some_and(|(_, mapping)| mapping.last >= first) {
            return Err(Status::Range);
        }
        let starts: Vec<u64> = inside.map(|(first, _)| *first).collect();
        self.mappings -= starts.len();
        for start in starts {
            domain.mappings.remove(&start);
        }
        self.shadows(id).for_each(|shadow| shadow.unmap(first..=last));
        Ok(())
    }

    /// Where `len` bytes at `addr` are for `endpoint`, in at most `max` pieces; `Ok(None)`: in more.
    pub(super) fn translate(
        &self,
        endpoint: u32,
        addr: u64,
        len: u32,
        write: bool,
        max: usize,
    ) -> Result<Option<Pieces>, Blocked> {
        let blocked = |reason, address| Err(Blocked { reason, address });
        let domain = self.endpoints.get(&endpoint).and_then(|place| place.domain);
        let domain = domain.and_then(|id| self.domains.get(&id));
        let all = || {
            let addr = GuestAddress(addr);
            Ok(Some(Pieces::from_elem(Segment { addr, len }, 1)))
        };
        let domain = match domain {
            domain if self.passes(domain) => return all(),
            None => return blocked(Reason::Domain, addr),
            Some(domain) => domain,
        };
        let mut pieces = Pieces::new();
        let (mut at, mut left) = (addr, u64::from(len));
        let wanted = if write { access::WRITE } else { access::READ };
        while left > 0 {
            let found = domain.mappings.range(..=at).next_back();
            let found = found.filter(|(_, mapping)| mapping.last >= at && mapping.flags & wanted != 0);
            let Some((first, mapping)) = found else {
                return blocked(Reason::Mapping, at);
            };
            let here = (mapping.last - at + 1).min(left);
            let phys = mapping.phys + (at - first);
            let full = pieces.len() == max;
            match pieces.last_mut() {
                // `here` is `left` at most, and that fits.
                Some(before) if before.addr.0 + u64::from(before.len) == phys => before.len += here as u32,
                _ if full => return Ok(None),
                _ => pieces.push(Segment {
                    addr: GuestAddress(phys),
                    len: here as u32,
                }),
            }
            at += here;
            left -= here;
        }
        Ok(Some(pieces))
    }

    /// All domains.
    pub(super) fn save(&self) -> Vec<IommuDomainV1> {
        let of = |id: u32| {
            let inside = self.endpoints.iter().filter(move |(_, place)| place.domain == Some(id));
            inside.map(|(endpoint, _)| *endpoint).collect()
        };
        let domain = |(id, domain): (&u32, &Domain)| IommuDomainV1 {
            id: *id,
            bypass: domain.bypass,
            endpoints: of(*id),
            mappings: domain.mappings.iter().map(saved).collect(),
        };
        self.domains.iter().map(domain).collect()
    }

    /// Continues with saved domains, whose endpoints are still to come.
    pub(super) fn restore(&mut self, bypass: bool, domains: &[IommuDomainV1]) -> Done {
        self.clear();
        self.bypass = bypass;
        for saved in domains {
            let known = |endpoint: &u32| self.endpoints.get(endpoint).is_some_and(|place| place.domain.is_some());
            let wrong = saved
                .endpoints
                .iter()
                .any(|endpoint| *endpoint > 0xffff || known(endpoint));
            if wrong || saved.endpoints.is_empty() || saved.id > LAST_DOMAIN || self.domains.contains_key(&saved.id) {
                return Err(Status::Invalid);
            }
            for endpoint in &saved.endpoints {
                self.leave(*endpoint);
                self.join(*endpoint, saved.id, saved.bypass);
            }
            for mapping in &saved.mappings {
                self.insert(saved.id, mapping)?;
            }
        }
        Ok(())
    }
}

/// What the driver is told when something cannot follow.
fn refused(error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::OutOfMemory => Status::NoMemory,
        _ => Status::Device,
    }
}

fn saved((first, mapping): (&u64, &Mapping)) -> IommuMappingV1 {
    IommuMappingV1 {
        first: *first,
        last: mapping.last,
        phys: mapping.phys,
        flags: mapping.flags,
    }
}

/// Whether anything from `first` to `last` is mapped.
fn overlaps(mappings: &BTreeMap<u64, Mapping>, first: u64, last: u64) -> bool {
    // Mappings do not overlap each other, so the one that begins last before the end also ends last.
    let before = mappings.range(..=last).next_back();
    before.is_some_and(|(_, mapping)| mapping.last >= first)
}
