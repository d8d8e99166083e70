//! A VM described by a file: the JSON of `vm.create`.

use std::fs::File;
use std::io::{self, Read, stdin};
use std::path::Path;

use anyhow::{Context, bail};
use triarch_api::{VmConfig, read_object};

/// Longer is no configuration: the API takes as much.
const LONGEST: u64 = 512 << 10;

/// Reads the configuration in `path`; `-` is standard input. Descriptors in it are those this process inherited. Names of fields that
/// were ignored come with it.
pub(crate) fn read(path: &Path) -> anyhow::Result<(VmConfig, Vec<String>)> {
    let text = if path == "-" {
        contents(stdin().lock())
    } else {
        File::open(path).and_then(contents)
    };
    let name = name(path);
    let text = text.with_context(|| format!("--config: cannot read {name}"))?;
    if text.len() as u64 > LONGEST {
        bail!("--config: {name} has more than {LONGEST} bytes, which no configuration needs");
    }
    read_object(&text).with_context(|| name)
}

/// What errors call it.
pub(crate) fn name(path: &Path) -> String {
    match path.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => path.display().to_string(),
    }
}

fn contents(from: impl Read) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    from.take(LONGEST + 1).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn error(text: &[u8]) -> String {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("vm.json");
        fs::write(&path, text).expect("write");
        let text = format!("{:#}", read(&path).expect_err("refused"));
        text.replace(&format!("{}/", dir.path().display()), "")
    }

    #[test]
    fn errors_name_the_file_and_the_place_in_it() {
        let text = error(br#"{"disks": [{"num_queues": "many"}]}"#);
        assert!(
            text.starts_with("vm.json: disks[0].num_queues: invalid type: string"),
            "{text}"
        );
        assert_eq!(error(b"[]"), "vm.json: it is not a JSON object");
        assert!(
            error(b"{\n,").starts_with("vm.json: it is not JSON: "),
            "{}",
            error(b"{\n,")
        );
        assert!(error(b"{\n,").contains("line 2"));
        let text = error(br#"{"pmem": [{"file": "a"}]}"#);
        assert_eq!(text, "vm.json: this version does not support pmem; leave it out");
        assert!(error(&vec![b' '; LONGEST as usize + 1]).contains("more than 524288 bytes"));
        let text = format!("{:#}", read(Path::new("/nonexistent/vm.json")).expect_err("no file"));
        assert!(
            text.starts_with("--config: cannot read /nonexistent/vm.json: No such file"),
            "{text}"
        );
    }

    #[test]
    fn descriptors_in_it_are_kept_and_unknown_fields_named() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("vm.json");
        fs::write(&path, br#"{"net": [{"fds": [5]}], "memory": {"sise": 1}}"#).expect("write");
        let (config, ignored) = read(&path).expect("a configuration");
        assert_eq!(config.net.expect("net")[0].fds, Some(vec![5]));
        assert_eq!(ignored, ["memory.sise"]);
    }
}
