//! Which parts of a BAR the guest reaches without the VMM.

use std::ops::Range;

use crate::kernel::Region;

/// The parts of `region` that can be mapped, in whole pages of `page` bytes, without those that have something of `trapped`.
pub(crate) fn mappable(region: &Region, trapped: &[Range<u64>], page: u64) -> Vec<Range<u64>> {
    if !region.mappable {
        return Vec::new();
    }
    let whole = vec![(0, region.size)];
    let given = region.sparse.as_ref().unwrap_or(&whole);
    let mut areas: Vec<Range<u64>> = Vec::new();
    for (start, size) in given {
        let end = start.saturating_add(*size).min(region.size) / page * page;
        let start = start.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        if start < end {
            areas.push(start..end);
        }
    }
    for hole in trapped {
        let hole = hole.start / page * page..hole.end.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        let parts = areas.into_iter().flat_map(|area| {
            let before = area.start..area.end.min(hole.start);
            let after = area.start.max(hole.end)..area.end;
            [before, after].into_iter().filter(|part| part.start < part.end)
        });
        areas = parts.collect();
    }
    areas
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(size: u64, sparse: Option<Vec<(u64, u64)>>) -> Region {
        Region {
            size,
            offset: 0,
            mappable: true,
            sparse,
        }
    }

    /// Start and end of what can be mapped, if `trapped`, starts and ends, cannot.
    fn parts(region: &Region, trapped: &[(u64, u64)], page: u64) -> Vec<(u64, u64)> {
        let trapped: Vec<_> = trapped.iter().map(|(start, end)| *start..*end).collect();
        let areas = mappable(region, &trapped, page).into_iter();
        areas.map(|area| (area.start, area.end)).collect()
    }

    #[test]
    fn the_pages_of_the_table_are_left_out() {
        let all = region(0x4000, None);
        assert_eq!(parts(&all, &[], 0x1000), [(0, 0x4000)]);
        let table = [(0x2000, 0x2410), (0x3000, 0x3010)];
        assert_eq!(parts(&all, &table, 0x1000), [(0, 0x2000)]);
        let around = [(0, 0x1000), (0x2000, 0x4000)];
        assert_eq!(parts(&all, &[(0x1800, 0x1810)], 0x1000), around);
        assert_eq!(
            parts(&all, &[(0x1ff8, 0x2008)], 0x1000),
            [(0, 0x1000), (0x3000, 0x4000)]
        );
        assert_eq!(parts(&all, &[(0x1800, 0x1810)], 0x10000), [], "a host with large pages");
        assert_eq!(parts(&region(0x800, None), &[], 0x1000), [], "less than a page");
    }

    #[test]
    fn what_the_kernel_leaves_out_stays_out() {
        let sparse = Some(vec![(0, 0x1000), (0x2000, 0x10_0000), (0x1800, 0x100)]);
        let around = [(0, 0x1000), (0x2000, 0x4000)];
        assert_eq!(parts(&region(0x4000, sparse), &[], 0x1000), around);
        let none = Region {
            mappable: false,
            ..region(0x4000, None)
        };
        assert_eq!(parts(&none, &[], 0x1000), []);
    }
}
