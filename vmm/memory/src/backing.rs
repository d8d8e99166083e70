//! Guest memory whose parts are backed in different ways.

use std::fs::File;
use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryRegion};

use crate::handed::adopt;
use crate::ram::{allocate, check_host_has, page_size};
use crate::{GuestMemory, MemoryError, RamOptions};

/// How memory is backed, by guest physical addresses.
#[derive(Debug, Clone)]
pub struct Backing {
    zones: Vec<(Range<u64>, RamOptions)>,
    rest: RamOptions,
}

impl Backing {
    /// Each of `zones` has options of its own, and all that is in none has `rest`.
    pub fn new(zones: Vec<(Range<u64>, RamOptions)>, rest: RamOptions) -> Self {
        Self { zones, rest }
    }

    /// How the memory at `gpa` is backed, or would be.
    pub fn of(&self, gpa: u64) -> &RamOptions {
        let zone = self.zones.iter().find(|(range, _)| range.contains(&gpa));
        zone.map_or(&self.rest, |(_, options)| options)
    }

    /// Bytes of the pages that back it. Finding out takes files of the host's.
    pub(crate) fn pages(&self) -> Result<Pages, MemoryError> {
        let zones = self.zones.iter();
        let zones: Result<Vec<_>, _> = zones
            .map(|(range, options)| Ok((range.clone(), page_size(options)?)))
            .collect();
        Ok(Pages {
            zones: zones?,
            rest: page_size(&self.rest)?,
        })
    }
}

/// Bytes of the pages that back memory, by guest physical addresses.
#[derive(Debug, Clone)]
pub(crate) struct Pages {
    zones: Vec<(Range<u64>, u64)>,
    rest: u64,
}

impl Pages {
    /// Of the memory at `gpa`.
    pub(crate) fn at(&self, gpa: u64) -> u64 {
        let zone = self.zones.iter().find(|(range, _)| range.contains(&gpa));
        zone.map_or(self.rest, |(_, page)| *page)
    }

    /// Of the largest.
    pub(crate) fn largest(&self) -> u64 {
        let zones = self.zones.iter().map(|(_, page)| *page);
        zones.fold(self.rest, u64::max)
    }
}

impl From<RamOptions> for Backing {
    fn from(options: RamOptions) -> Self {
        Self::new(Vec::new(), options)
    }
}

/// Where a zone of memory lies, sorted by address, and how it is backed.
#[derive(Debug, Clone)]
pub struct ZoneRam {
    /// Its name, for errors.
    pub id: String,
    /// GPA and size in bytes of each of its pieces.
    pub ranges: Vec<(GuestAddress, u64)>,
    /// How it is backed: if by a file, all pieces by the same.
    pub options: RamOptions,
}

/// Makes guest memory that consists of `zones`.
///
/// # Errors
/// The host has not as much in all, or cannot back one of them as it should; then the error names it.
pub fn allocate_zones(zones: &[ZoneRam]) -> Result<GuestMemory, MemoryError> {
    assemble(zones, zones, |zone, _| allocate(&zone.ranges, &zone.options))
}

/// The same of `files`, one of each zone, which [`check_handed`](crate::check_handed) approved.
///
/// # Errors
/// As [`allocate_zones`].
pub fn adopt_zones(zones: &[ZoneRam], files: &[File]) -> Result<GuestMemory, MemoryError> {
    assemble(zones, files, |zone, file| adopt(&zone.ranges, &zone.options, file))
}

/// Guest memory that consists of `zones`: what `make` makes of each of them and what there is for it.
fn assemble<T>(
    zones: &[ZoneRam],
    of: &[T],
    make: impl Fn(&ZoneRam, &T) -> Result<GuestMemory, MemoryError>,
) -> Result<GuestMemory, MemoryError> {
    let small = zones.iter().filter(|zone| zone.options.huge_pages.is_none());
    let bytes = small.flat_map(|zone| &zone.ranges).map(|(_, size)| size);
    check_host_has(bytes.fold(0, |sum, size| sum.saturating_add(*size)))?;
    let mut all = GuestMemory::new();
    for (zone, of) in zones.iter().zip(of) {
        let named = |source| MemoryError::Zone {
            id: zone.id.clone(),
            source: Box::new(source),
        };
        let mut made = make(zone, of).map_err(named)?;
        for &(base, size) in &zone.ranges {
            let (rest, region) = made
                .remove_region(base, size)
                .map_err(|error| named(MemoryError::Layout(error)))?;
            debug_assert_eq!(region.len(), size);
            all = all
                .insert_region(region)
                .map_err(|error| named(MemoryError::Layout(error)))?;
            made = rest;
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend, MemoryRegionAddress};

    use super::*;
    use crate::{Discarder, GuestMemoryHandle, HugePages};

    const MIB: u64 = 1 << 20;

    fn zone(id: &str, ranges: &[(u64, u64)], options: RamOptions) -> ZoneRam {
        ZoneRam {
            id: id.to_owned(),
            ranges: ranges.iter().map(|(at, size)| (GuestAddress(*at), *size)).collect(),
            options,
        }
    }

    fn shared() -> RamOptions {
        RamOptions {
            shared: true,
            ..RamOptions::default()
        }
    }

    #[test]
    fn each_zone_has_a_file_of_its_own_or_none() {
        let zones = [
            zone("a", &[(0, MIB)], RamOptions::default()),
            zone("b", &[(MIB, MIB), (8 * MIB, 2 * MIB)], shared()),
            zone("c", &[(10 * MIB, MIB)], shared()),
        ];
        let memory = allocate_zones(&zones).expect("allocate");
        let places: Vec<_> = memory
            .iter()
            .map(|region| {
                let offset = region.file_offset().map(|file| file.start());
                (region.start_addr().0, region.len(), offset)
            })
            .collect();
        let expected = [
            (0, MIB, None),
            (MIB, MIB, Some(0)),
            (8 * MIB, 2 * MIB, Some(MIB)),
            (10 * MIB, MIB, Some(0)),
        ];
        assert_eq!(places, expected);
        assert_eq!(memory.num_regions(), 4);
    }

    #[test]
    fn errors_name_the_zone() {
        let huge = RamOptions {
            huge_pages: Some(HugePages {
                page_size: Some(3 << 20),
            }),
            ..RamOptions::default()
        };
        let good = zone("good", &[(0, MIB)], RamOptions::default());
        let error = allocate_zones(&[good.clone(), zone("bad", &[(MIB, MIB)], huge)]).expect_err("refused");
        assert_eq!(error.to_string(), "the memory zone 'bad' cannot be made");
        let error = allocate_zones(&[good.clone(), zone("twice", &[(0, MIB)], shared())]).expect_err("refused");
        assert!(error.to_string().contains("'twice'"), "{error}");
        let half = 1 << 62;
        let large = zone("large", &[(MIB, half), (half + MIB, half)], RamOptions::default());
        assert!(matches!(
            allocate_zones(&[good, large]),
            Err(MemoryError::MoreThanHost { .. })
        ));
    }

    #[test]
    fn zones_are_found_by_address_and_given_back_as_they_are_backed() {
        let zones = [
            zone("a", &[(0, MIB)], RamOptions::default()),
            zone("b", &[(MIB, MIB)], shared()),
        ];
        let memory = GuestMemoryHandle::new(allocate_zones(&zones).expect("allocate"));
        let backing = Backing::new(vec![(MIB..2 * MIB, shared())], RamOptions::default());
        assert!(!backing.of(MIB - 1).shared && backing.of(MIB).shared && !backing.of(2 * MIB).shared);
        let discarder = Discarder::new(memory.clone(), backing).expect("a page size");
        for region in memory.memory().iter() {
            region
                .write_slice(&vec![7; MIB as usize], MemoryRegionAddress(0))
                .expect("fill");
        }
        discarder.discard(GuestAddress(MIB - 4096), 8192).expect("discard");
        let byte = |at| memory.memory().read_obj::<u8>(GuestAddress(at)).expect("memory");
        assert_eq!(
            [MIB - 4097, MIB - 4096, MIB, MIB + 4095, MIB + 4096].map(byte),
            [7, 0, 0, 0, 7]
        );
    }
}
