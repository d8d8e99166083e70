//! The flag of a guest that was saved.

use std::collections::BTreeSet;

use super::{FlagError, KeyValues, set};
use crate::{RestoreConfig, RestoredNet};

/// What `--restore` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What a request of the API would say.
    pub config: RestoreConfig,
    /// Numbers of the descriptors that would come with it: this process inherited them.
    pub fds: Vec<i32>,
}

/// `--restore source_url=file:///DIRECTORY,...`
pub fn restore(text: &str) -> Result<Restored, FlagError> {
    let known = [
        "source_url",
        "prefault",
        "memory_restore_mode",
        "resume",
        "net_fds",
        "clock",
        "track_writes",
    ];
    let kv = KeyValues::parse("--restore", text, &known, &[])?;
    let Some(url) = kv.text("source_url") else {
        return kv.refuse("it needs the directory of a snapshot; write source_url=file:///DIRECTORY".to_owned());
    };
    let mut config = RestoreConfig {
        source_url: url.to_owned(),
        ..RestoreConfig::default()
    };
    if let Err(error) = config.directory() {
        return kv.refuse(error.to_string());
    }
    set(&mut config.prefault, kv.switch("prefault")?);
    set(&mut config.memory_restore_mode, kv.get("memory_restore_mode")?);
    set(&mut config.resume, kv.switch("resume")?);
    set(&mut config.clock, kv.get("clock")?);
    set(&mut config.track_writes, kv.switch("track_writes")?);
    let (mut nets, mut fds) = (Vec::new(), Vec::new());
    for item in kv.list("net_fds")?.unwrap_or_default() {
        let Some((id, numbers)) = net(item) else {
            return kv.refuse(format!(
                "net_fds has '{item}'; write the id of an interface and the descriptors of its tap, like net0@[3,4]"
            ));
        };
        nets.push(RestoredNet {
            id: id.to_owned(),
            num_fds: numbers.len(),
        });
        fds.extend(numbers);
    }
    let mut seen = BTreeSet::new();
    if let Some(fd) = fds.iter().find(|fd| !seen.insert(**fd)) {
        return kv.refuse(format!("net_fds has the descriptor {fd} twice"));
    }
    config.net_fds = Some(nets).filter(|nets| !nets.is_empty());
    Ok(Restored { config, fds })
}

/// `net0@[3,4]`, or `net0@3`.
fn net(item: &str) -> Option<(&str, Vec<i32>)> {
    let (id, numbers) = item.split_once('@')?;
    let numbers = numbers
        .strip_prefix('[')
        .map_or(Some(numbers), |rest| rest.strip_suffix(']'))?;
    let number = |text: &str| text.parse().ok().filter(|fd| *fd >= 0);
    let numbers: Option<Vec<i32>> = numbers.split(',').map(number).collect();
    Some((id, numbers?)).filter(|_| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RestoreClock, RestoreMode};

    #[test]
    fn it_says_what_a_request_would() {
        let text = "source_url=file:///a,memory_restore_mode=mapped,resume=true,prefault=on,clock=passes,track_writes=on,net_fds=[n@[3,4],m@5]";
        let net = |id: &str, num_fds| RestoredNet {
            id: id.to_owned(),
            num_fds,
        };
        let expected = Restored {
            config: RestoreConfig {
                source_url: "file:///a".to_owned(),
                prefault: true,
                net_fds: Some(vec![net("n", 2), net("m", 1)]),
                memory_restore_mode: RestoreMode::Mapped,
                resume: true,
                clock: RestoreClock::Passes,
                track_writes: true,
            },
            fds: vec![3, 4, 5],
        };
        assert_eq!(restore(text), Ok(expected));
        let plain = restore("source_url=file:///a").expect("valid");
        assert_eq!((plain.config.resume, plain.config.net_fds), (false, None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| restore(text).expect_err("refused").to_string();
        for (text, words) in [
            ("resume=on", "write source_url=file:///DIRECTORY"),
            (
                "source_url=/a",
                "--restore: source_url: '/a' names no directory of this host",
            ),
            ("source_url=file:///a,memory_restore_mode=lazy", "copy, mapped"),
            ("source_url=file:///a,resume=maybe", "neither on nor off"),
            ("source_url=file:///a,net_fds=[n]", "like net0@[3,4]"),
            ("source_url=file:///a,net_fds=[n@[3,-1]]", "like net0@[3,4]"),
            ("source_url=file:///a,net_fds=[@[3]]", "like net0@[3,4]"),
            ("source_url=file:///a,net_fds=[n@[3]", "not closed"),
            ("source_url=file:///a,net_fds=[n@3,m@3]", "the descriptor 3 twice"),
            ("source_url=file:///a,shared=on", "there is no key 'shared'"),
        ] {
            assert!(error(text).contains(words), "{text}: {}", error(text));
        }
    }
}
