//! `iommu ...`

use crate::Guest;
use crate::dev::Setup;
use crate::shell::{Args, Reply};
use alloc::format;
use alloc::string::String;

/// Where the configuration space says what becomes of endpoints in no domain.
const BYPASS: u64 = 36;

fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

/// Runs one command on the first IOMMU.
pub fn run(guest: &mut Guest, args: &mut Args) -> Reply {
    let what = args.word("command")?;
    match what {
        "init" => return guest.restart("iommu", 0, &Setup::of(args)).map(|()| String::new()),
        "drop" => {
            guest.drop_driver("iommu", 0);
            return Ok(String::new());
        }
        _ => {}
    }
    let iommu = guest.iommu(0)?;
    let status = match what {
        "info" => {
            let config = iommu.registers();
            let number = |offset, len| config.config_number(offset, len);
            return Ok(format!(
                "features={:#x} mask={:#x} last={:#x} domains={} probe={} bypass={}",
                iommu.features,
                number(0, 8)?,
                number(16, 8)?,
                number(28, 4)?,
                number(32, 4)?,
                number(BYPASS, 1)?,
            ));
        }
        "bypass" => {
            let on = args.number_to("0|1", 255)? as u8;
            return iommu.registers().write_config8(BYPASS, on).map(|()| String::new());
        }
        "fault" => {
            return Ok(match iommu.fault(args.number_to("MS", 60_000)?) {
                None => "none".into(),
                Some((reason, flags, endpoint, address)) => {
                    format!("reason={reason} flags={flags:#x} endpoint={endpoint:#x} address={address:#x}")
                }
            });
        }
        "attach" | "detach" => {
            let (domain, endpoint) = (args.number("DOMAIN")? as u32, args.number("ENDPOINT")? as u32);
            let flags = u32::from(args.has("bypass"));
            let kind = if what == "attach" { 1 } else { 2 };
            iommu.request(kind, &[domain, endpoint, flags, 0], 4)?
        }
        "map" => {
            let domain = args.number("DOMAIN")? as u32;
            let [f0, f1] = halves(args.number("FIRST")?);
            let [l0, l1] = halves(args.number("LAST")?);
            let [p0, p1] = halves(args.number("PHYS")?);
            let flags = args.number("FLAGS")? as u32;
            iommu.request(3, &[domain, f0, f1, l0, l1, p0, p1, flags], 4)?
        }
        "unmap" => {
            let domain = args.number("DOMAIN")? as u32;
            let [f0, f1] = halves(args.number("FIRST")?);
            let [l0, l1] = halves(args.number("LAST")?);
            iommu.request(4, &[domain, f0, f1, l0, l1, 0], 4)?
        }
        "probe" => {
            let room = iommu.registers().config_number(32, 4)? as usize;
            let mut words = [0; 17];
            words[0] = args.number("ENDPOINT")? as u32;
            let status = iommu.request(5, &words, room + 4)?;
            let answer = iommu.answer(24);
            let word = |at: usize| u32::from_le_bytes([answer[at], answer[at + 1], answer[at + 2], answer[at + 3]]);
            let (kind, subtype, start, end) = (word(0), word(4), word(8), word(16));
            return Ok(format!(
                "status={status} property={kind:#x} subtype={subtype} start={start:#x} end={end:#x}"
            ));
        }
        "raw" => iommu.request(args.number_to("TYPE", 255)? as u8, &[args.number("WORD")? as u32], 4)?,
        other => return Err(format!("iommu {other}?")),
    };
    Ok(format!("status={status}"))
}
