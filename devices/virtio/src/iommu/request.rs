//! Requests of the driver and their answers (virtio 1.2, 5.13.6).

use std::ops::RangeInclusive;

use super::domains::IommuMappingV1;

/// Bytes of the longest request.
pub(super) const REQUEST_MAX: usize = 72;
/// Bytes of an answer's tail: the status and three that are reserved.
pub(super) const TAIL: usize = 4;
/// Bytes of the properties that PROBE tells, before the tail.
pub(super) const PROPERTIES: usize = 512;
/// Bytes of the property of one reserved region.
const REGION: usize = 24;
/// As many as are told, with room for the end of the list.
pub(super) const MAX_REGIONS: usize = PROPERTIES / REGION - 1;

/// VIRTIO_IOMMU_ATTACH_F_BYPASS.
const ATTACH_BYPASS: u32 = 1;
/// VIRTIO_IOMMU_PROBE_T_RESV_MEM.
const RESERVED_REGION: u16 = 1;

/// How a request ended (VIRTIO_IOMMU_S_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    Unsupported = 2,
    Device = 3,
    Invalid = 4,
    Range = 5,
    NoEntry = 6,
    NoMemory = 8,
}

/// What a driver asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Attach { domain: u32, endpoint: u32, bypass: bool },
    Detach { domain: u32, endpoint: u32 },
    Map { domain: u32, mapping: IommuMappingV1 },
    Unmap { domain: u32, first: u64, last: u64 },
    Probe { endpoint: u32 },
}

/// Addresses that a driver must not map (VIRTIO_IOMMU_RESV_MEM_T_*).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReservedRegion {
    /// They are no memory for this device.
    Nothing(RangeInclusive<u64>),
    /// Interrupts by message go there, as they are.
    Messages(RangeInclusive<u64>),
}

impl ReservedRegion {
    /// The addresses.
    pub(super) fn range(&self) -> &RangeInclusive<u64> {
        match self {
            Self::Nothing(range) | Self::Messages(range) => range,
        }
    }
}

/// Fields one after the other, in little endian.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_le_bytes)
    }
}

impl Request {
    /// Reads a request of `bytes`, which the tail follows.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let mut fields = Fields(bytes);
        let [kind, head @ ..]: [u8; 4] = fields.bytes().ok_or(Status::Invalid)?;
        if !matches!(kind, 1..=5) {
            return Err(Status::Unsupported);
        }
        let (request, reserved) = Self::body(kind, &mut fields).ok_or(Status::Invalid)?;
        // The reserved bytes at the end, and not one more.
        let empty = head.iter().chain(fields.0).all(|byte| *byte == 0);
        match empty && fields.0.len() == reserved {
            true => Ok(request),
            false => Err(Status::Invalid),
        }
    }

    /// The request and how many reserved bytes end it.
    fn body(kind: u8, fields: &mut Fields<'_>) -> Option<(Self, usize)> {
        Some(match kind {
            1 => {
                let (domain, endpoint) = (fields.u32()?, fields.u32()?);
                let bypass = match fields.u32()? {
                    0 => false,
                    ATTACH_BYPASS => true,
                    _ => return None,
                };
                let request = Self::Attach {
                    domain,
                    endpoint,
                    bypass,
                };
                (request, 4)
            }
            2 => {
                let (domain, endpoint) = (fields.u32()?, fields.u32()?);
                (Self::Detach { domain, endpoint }, 8)
            }
            3 => {
                let domain = fields.u32()?;
                let mapping = IommuMappingV1 {
                    first: fields.u64()?,
                    last: fields.u64()?,
                    phys: fields.u64()?,
                    flags: fields.u32()?,
                };
                (Self::Map { domain, mapping }, 0)
            }
            4 => {
                let (domain, first, last) = (fields.u32()?, fields.u64()?, fields.u64()?);
                (Self::Unmap { domain, first, last }, 4)
            }
            _ => {
                let endpoint = fields.u32()?;
                (Self::Probe { endpoint }, 64)
            }
        })
    }
}

/// The properties of an endpoint with these `regions`: as many as there is room for, and zeroes behind them.
pub(super) fn properties(regions: &[ReservedRegion]) -> [u8; PROPERTIES] {
    let mut all = [0; PROPERTIES];
    for (property, region) in all.chunks_exact_mut(REGION).zip(regions).take(MAX_REGIONS) {
        let (kind, range) = match region {
            ReservedRegion::Nothing(range) => (0, range),
            ReservedRegion::Messages(range) => (1, range),
        };
        property[..2].copy_from_slice(&RESERVED_REGION.to_le_bytes());
        property[2..4].copy_from_slice(&(REGION as u16 - 4).to_le_bytes());
        property[4] = kind;
        property[8..16].copy_from_slice(&range.start().to_le_bytes());
        property[16..].copy_from_slice(&range.end().to_le_bytes());
    }
    all
}
