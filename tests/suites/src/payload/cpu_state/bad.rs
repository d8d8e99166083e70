//! States that nobody saved: each is refused in a clear sentence, or taken, and nothing panics.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use triarch_arch::{Elapsed, PlatformStateV1, VcpuStateV1};
use triarch_harness::dice::Dice;
use triarch_harness::suite::{Context, Outcome, is_patient};

use super::bed::{Bed, Saved};
use crate::payload::guest::is_arm;

/// The whole chain of causes.
fn refusal(saved: &Saved, fresh: &Bed) -> Result<String> {
    match Bed::restore(saved, &fresh.memory, Elapsed::Stands) {
        Err(error) => Ok(format!("{error:#}")),
        Ok(_) => anyhow::bail!("it was taken"),
    }
}

fn expect(saved: &Saved, fresh: &Bed, words: &[&str]) -> Result<()> {
    let told = refusal(saved, fresh).map_err(|error| error.context(format!("{words:?}")))?;
    ensure!(words.iter().all(|word| told.contains(word)), "{told}: {words:?}");
    Ok(())
}

pub(super) fn refuses_what_is_not_of_one_guest(_: &Context) -> Result<Outcome> {
    let fresh = Bed::new(2, 3)?;
    let good = fresh.save()?;
    let with = |change: &dyn Fn(&mut Saved)| {
        let mut saved = good.clone();
        change(&mut saved);
        saved
    };
    let more = with(&|saved| saved.vcpus.extend(good.vcpus.clone()));
    expect(&more, &fresh, &["4 vCPUs", "at most"])?;
    let none = with(&|saved| saved.vcpus.clear());
    expect(&none, &fresh, &["0 vCPUs"])?;
    // The second one runs, and was not saved.
    let fewer = with(&|saved| drop(saved.vcpus.pop()));
    expect(&fewer, &fresh, &["has vCPU 1"])?;
    let roomier = with(&|saved| {
        saved.plan["max"] = 4.into();
        saved.plan["topology"]["cores_per_die"] = 4.into();
    });
    expect(&roomier, &fresh, &["3 vCPUs", "4"])?;
    let empty = with(&|saved| saved.plan["boot"] = 0.into());
    expect(&empty, &fresh, &["damaged", "vCPUs of 3 at most"])?;
    let misshapen = with(&|saved| saved.plan["topology"]["packages"] = 7.into());
    expect(&misshapen, &fresh, &["topology"])?;
    let unknown = with(&|saved| saved.vcpus[0]["warp"] = 1.into());
    expect(&unknown, &fresh, &["unknown field", "warp"])?;
    let stranger = with(&|saved| saved.firmware = json!({ "smoke_signals": [] }));
    expect(&stranger, &fresh, &["smoke_signals"])?;
    Ok(Outcome::Passed)
}

pub(super) fn refuses_what_is_damaged(_: &Context) -> Result<Outcome> {
    let fresh = Bed::new(1, 1)?;
    let good = fresh.save()?;
    let cases: Cases = if is_arm() { arm() } else { x86() };
    for (change, words) in cases {
        let mut saved = good.clone();
        change(&mut saved);
        expect(&saved, &fresh, words)?;
    }
    ensure_nothing_panics(&good, &fresh)?;
    read_other_texts(&good)?;
    Ok(Outcome::Passed)
}

/// Texts that differ from good ones by a few bytes, or that end early, are read or refused.
fn read_other_texts(good: &Saved) -> Result<()> {
    let mut dice = Dice::new(1);
    let texts = [&good.vcpus[0], &good.platform].map(Value::to_string);
    let rounds = if is_patient() { 20 } else { 200 };
    for round in 0..rounds {
        for (text, is_vcpu) in texts.iter().zip([true, false]) {
            let mut text = text.clone().into_bytes();
            for _ in 0..3 {
                let at = dice.below(text.len());
                text[at] = dice.pick(b"0123456789abcdef{}[]\",:- \xff").unwrap_or_default();
            }
            if round % 2 == 0 {
                text.truncate(dice.below(text.len()));
            }
            let refused = match is_vcpu {
                true => serde_json::from_slice::<VcpuStateV1>(&text).is_err(),
                false => serde_json::from_slice::<PlatformStateV1>(&text).is_err(),
            };
            ensure!(
                refused || round % 2 == 1,
                "half of it was taken: {}",
                String::from_utf8_lossy(&text)
            );
        }
    }
    Ok(())
}

type Cases = Vec<(Box<dyn Fn(&mut Saved)>, &'static [&'static str])>;

fn x86() -> Cases {
    let first = |change: fn(&mut Value)| Box::new(move |saved: &mut Saved| change(&mut saved.vcpus[0]));
    vec![
        // IA32_BIOS_SIGN_ID may change, what is no MSR may not.
        (
            first(|vcpu| vcpu["msrs"] = json!([{ "index": 0x8b, "value": 77 }, { "index": 0x1234_5678, "value": 1 }])),
            &["MSR.12345678", "0x1", "does not know it"],
        ),
        (
            first(|vcpu| vcpu["xsave"] = "ff".repeat(1 << 16).into()),
            &["XSAVE area of 65536 bytes"],
        ),
        (
            first(|vcpu| vcpu["xsave"] = "00".repeat(100).into()),
            &["XSAVE area has 100 bytes"],
        ),
        (first(|vcpu| vcpu["xsave"] = "0g".into()), &["hexadecimal"]),
        (
            first(|vcpu| vcpu["local_apic"] = json!([1, 2, 3])),
            &["local APIC has 3 registers"],
        ),
        (
            first(|vcpu| vcpu["xcrs"] = json!([{ "index": 0, "value": u64::MAX }])),
            &["XCR0"],
        ),
        (first(|vcpu| vcpu["run"] = "asleep".into()), &["asleep"]),
        (
            first(|vcpu| vcpu["special"]["cr4"] = u64::MAX.into()),
            &["special registers"],
        ),
        (Box::new(|saved| saved.platform["pics"] = json!([])), &["length"]),
    ]
}

fn arm() -> Cases {
    let first = |change: fn(&mut Value)| Box::new(move |saved: &mut Saved| change(&mut saved.vcpus[0]));
    vec![
        (
            first(|vcpu| vcpu["registers"] = json!([{ "id": 0x6030_0000_0013_ffff_u64, "value": "0100000000000000" }])),
            &["S3_7_C15_C15_7", "does not know it"],
        ),
        (
            first(|vcpu| vcpu["registers"] = json!([{ "id": 0x6030_0000_0010_0000_u64, "value": "01" }])),
            &["0x6030000000100000", "1 bytes"],
        ),
        // ID_AA64PFR0_EL1 of a CPU that has everything.
        (
            first(|vcpu| vcpu["registers"] = json!([{ "id": 0x6030_0000_0013_c020_u64, "value": "ffffffffffffffff" }])),
            &["ID_AA64PFR0_EL1", "does not let it be set"],
        ),
        (first(|vcpu| vcpu["features"] = 0.into()), &["features 0x0"]),
        (first(|vcpu| vcpu["run"] = "asleep".into()), &["asleep"]),
        (
            Box::new(|saved| saved.platform["clock"]["counter_hz"] = 77.into()),
            &["77 Hz", "cannot scale"],
        ),
        (
            Box::new(|saved| saved.platform["distributor"]["enabled"] = json!([1])),
            &["1 of 2"],
        ),
        (
            Box::new(|saved| saved.platform["cpus"] = json!([])),
            &["0 vCPUs", "interrupt controller has 1"],
        ),
        // Tables beyond memory.
        (
            Box::new(|saved| {
                // Valid, entries of 8 bytes, one page of 64 KiB.
                saved.platform["its"]["tables"][0] = (1_u64 << 63 | 1 << 56 | 7 << 48 | 0xffff << 32 | 2 << 8).into();
                saved.platform["its"]["tables"][1] = (1_u64 << 63 | 4 << 56 | 7 << 48 | 0xffff << 32 | 2 << 8).into();
            }),
            &["ITS"],
        ),
        (
            Box::new(|saved| saved.platform["its"]["tables"] = json!([0, 0])),
            &["length"],
        ),
    ]
}

/// Every number of the state becomes another one; what KVM makes of it is its business, as long as there is an answer.
fn ensure_nothing_panics(good: &Saved, fresh: &Bed) -> Result<()> {
    let mut dice = Dice::new(1);
    let rounds = if is_patient() { 4 } else { 20 };
    for _ in 0..rounds {
        let mut saved = good.clone();
        for part in [&mut saved.plan, &mut saved.platform, &mut saved.firmware]
            .into_iter()
            .chain(&mut saved.vcpus)
        {
            disturb(part, &mut dice);
        }
        if let Err(error) = Bed::restore(&saved, &fresh.memory, Elapsed::Passes) {
            ensure!(error.to_string().len() > 10, "{error}");
        }
    }
    Ok(())
}

fn disturb(value: &mut Value, dice: &mut Dice) {
    match value {
        Value::Object(fields) => fields.values_mut().for_each(|value| disturb(value, dice)),
        Value::Array(items) => items.iter_mut().for_each(|value| disturb(value, dice)),
        Value::Number(number) if dice.below(50) == 0 => {
            let other = dice.number() >> dice.below(64);
            *number = (number.as_u64().unwrap_or(0) ^ other).into();
        }
        Value::Bool(bit) if dice.below(20) == 0 => *bit = !*bit,
        _ => {}
    }
}
