//! `cpu-features` for people.

use triarch_api::{CpuDescription, CpuFeatures};

use crate::units::clean;

/// Columns of lists.
const WIDTH: usize = 100;
/// Columns of what stands before them.
const NAME: usize = 11;

/// `vmm.cpu-features`.
pub(crate) fn features(body: &str) -> serde_json::Result<String> {
    let CpuFeatures { host, vm } = serde_json::from_str(body)?;
    let mut text = line("Host", &[title(&host)]);
    if let Some(khz) = host.tsc_khz {
        let scaling = match host.tsc_scaling {
            Some(true) => "; guests can have another frequency",
            Some(false) => "; guests cannot have another frequency",
            None => "",
        };
        text += &line("TSC", &[format!("{khz} kHz{scaling}")]);
    }
    text += &list("Features", &host.features);
    text += &list("Values", &values(&host));
    text += &list("Unnamed", &host.unnamed);
    match vm {
        Some(vm) => text += &difference(&host, &vm),
        None => text += &line("VM", &["no guest has been booted".to_owned()]),
    }
    Ok(text)
}

fn title(cpu: &CpuDescription) -> String {
    let mut parts = vec![cpu.vendor.clone().unwrap_or_else(|| cpu.architecture.clone())];
    parts.extend(
        cpu.signature
            .map(|s| format!("family {}, model {}, stepping {}", s.family, s.model, s.stepping)),
    );
    parts.extend(cpu.kernel.as_ref().map(|release| format!("Linux {release}")));
    parts.join(", ")
}

/// Numbers decimal while a person can read them.
fn values(cpu: &CpuDescription) -> Vec<String> {
    let shown = |(name, value): (&String, &u64)| match value {
        0..=0xffff_ffff => format!("{name}={value}"),
        _ => format!("{name}={value:#x}"),
    };
    cpu.values.iter().map(shown).collect()
}

/// What of `host` the guest has not, or otherwise.
fn difference(host: &CpuDescription, vm: &CpuDescription) -> String {
    let has = [&vm.features, &vm.unnamed];
    let all = host.features.iter().chain(&host.unnamed);
    let lacks: Vec<String> = all
        .filter(|name| has.iter().all(|list| !list.contains(*name)))
        .cloned()
        .collect();
    let (ours, theirs) = (values(host), values(vm));
    let other: Vec<String> = theirs.into_iter().filter(|value| !ours.contains(value)).collect();
    if lacks.is_empty() && other.is_empty() {
        return line("VM", &["has all of it".to_owned()]);
    }
    list("VM lacks", &lacks) + &list("VM has", &other)
}

fn line(name: &str, words: &[String]) -> String {
    format!("{name:<NAME$}{}\n", clean(&words.join(" ")))
}

/// Words in lines that are not too long, the name before the first; nothing without words.
fn list(name: &str, words: &[String]) -> String {
    let mut text = String::new();
    let mut start = 0;
    while start < words.len() {
        let mut width = NAME;
        let fit = words[start..].iter().take_while(|word| {
            width += word.chars().count() + 1;
            width <= WIDTH + 1
        });
        let end = start + fit.count().max(1);
        text += &line(if start == 0 { name } else { "" }, &words[start..end]);
        start = end;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = r#""host":{"architecture":"x86_64","vendor":"HygonGenuine",
        "signature":{"family":24,"model":16,"stepping":0},"kernel":"6.12.0","tsc_khz":2600000,"tsc_scaling":true,
        "features":["pni","aes","avx2"],"values":{"physical_address_bits":48,"wide":4294967296},"unnamed":["MSR.10A[63]"]}"#;

    #[test]
    fn a_host_is_shown_by_name() {
        let text = features(&format!("{{{HOST}}}")).expect("text");
        assert_eq!(
            text,
            "\
Host       HygonGenuine, family 24, model 16, stepping 0, Linux 6.12.0
TSC        2600000 kHz; guests can have another frequency
Features   pni aes avx2
Values     physical_address_bits=48 wide=0x100000000
Unnamed    MSR.10A[63]
VM         no guest has been booted
"
        );
        assert!(features("{}").is_err());
    }

    #[test]
    fn of_the_vm_is_shown_what_differs() {
        let vm = |features: &str, bits: u8| {
            let values = format!(r#"{{"physical_address_bits":{bits},"wide":4294967296}}"#);
            let vm = format!(
                r#"{{"architecture":"x86_64","features":{features},"values":{values},"unnamed":["MSR.10A[63]"]}}"#
            );
            super::features(&format!(r#"{{{HOST},"vm":{vm}}}"#)).expect("text")
        };
        assert!(vm(r#"["pni","aes","avx2"]"#, 48).ends_with("VM         has all of it\n"));
        let less = vm(r#"["pni"]"#, 40);
        assert!(
            less.ends_with("VM lacks   aes avx2\nVM has     physical_address_bits=40\n"),
            "{less}"
        );
    }

    #[test]
    fn lists_are_broken_into_lines() {
        let words: Vec<String> = (0..40).map(|n| format!("feature{n:02}")).collect();
        let text = list("Features", &words);
        assert!(
            text.lines().count() > 3 && text.lines().all(|line| line.len() <= WIDTH),
            "{text}"
        );
        assert!(
            text.lines().skip(1).all(|line| line.starts_with("           feature")),
            "{text}"
        );
        assert_eq!(text.split_whitespace().skip(1).count(), 40);
        assert_eq!(list("Long", &["x".repeat(200)]).lines().count(), 1);
        assert_eq!(list("None", &[]), "");
    }
}
