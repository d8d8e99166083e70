//! The `key=value,key=value` dialect of device flags.
//!
//! Commas inside of `[...]` and `"..."` do not separate. Lists are `[a,b]`, switches `on` and `off`.

use std::fmt::Display;
use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

use anyhow::{Context, bail};
use triarch_api::parse_size;

/// One flag's value, taken apart.
pub(crate) struct KeyValues<'a> {
    flag: &'static str,
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> KeyValues<'a> {
    /// Takes `text` apart. Keys beside `known` are errors. Keys in `elsewhere` exist in Cloud Hypervisor and not here yet: they are
    /// accepted with the value that changes nothing.
    pub(crate) fn parse(flag: &'static str, text: &'a str, known: &[&str], elsewhere: &[&str]) -> anyhow::Result<Self> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in split(text).with_context(|| format!("{flag} '{text}'"))? {
            if part.is_empty() {
                bail!(
                    "{flag}: a key=value is empty in '{text}'; it takes {}",
                    known.join(", ")
                );
            }
            let Some((key, value)) = part.split_once('=') else {
                bail!("{flag}: '{part}' is not key=value; it takes {}", known.join(", "));
            };
            if pairs.iter().any(|(k, _)| *k == key) {
                bail!("{flag}: '{key}' is given twice; give it once");
            }
            if elsewhere.contains(&key) {
                if !matches!(value, "off" | "false" | "0") {
                    bail!("{flag}: {key}={value} is not supported by this version; leave {key} out");
                }
            } else if known.contains(&key) {
                pairs.push((key, unquote(value)));
            } else {
                bail!("{flag}: there is no key '{key}'; it takes {}", known.join(", "));
            }
        }
        Ok(Self { flag, pairs })
    }

    /// The text of `key`.
    pub(crate) fn text(&self, key: &str) -> Option<&'a str> {
        self.pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    /// `key` as a value that parses itself.
    pub(crate) fn get<T: FromStr>(&self, key: &str) -> anyhow::Result<Option<T>>
    where
        T::Err: Display,
    {
        let Some(text) = self.text(key) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => bail!("{}: {key}={text} is invalid: {error}", self.flag),
        }
    }

    /// `key` as a whole number.
    pub(crate) fn number<T: FromStr<Err = ParseIntError>>(&self, key: &str) -> anyhow::Result<Option<T>> {
        let Some(text) = self.text(key) else { return Ok(None) };
        match text.parse::<T>() {
            Ok(value) => Ok(Some(value)),
            Err(error) if *error.kind() == IntErrorKind::PosOverflow => {
                bail!("{}: {key}={text} is too large; write a smaller number", self.flag)
            }
            Err(_) => bail!("{}: {key}={text} is no whole number; write digits only", self.flag),
        }
    }

    /// `key` as a size in bytes.
    pub(crate) fn size(&self, key: &str) -> anyhow::Result<Option<u64>> {
        let Some(text) = self.text(key) else { return Ok(None) };
        parse_size(text)
            .map(Some)
            .with_context(|| format!("{}: {key} is invalid", self.flag))
    }

    /// `key` as a switch.
    pub(crate) fn switch(&self, key: &str) -> anyhow::Result<Option<bool>> {
        match self.text(key) {
            None => Ok(None),
            Some("on" | "true") => Ok(Some(true)),
            Some("off" | "false") => Ok(Some(false)),
            Some(other) => bail!("{}: {key}={other} is neither on nor off; write one of them", self.flag),
        }
    }

    /// `key` as a list: `[a,b]`, or one value.
    pub(crate) fn list(&self, key: &str) -> anyhow::Result<Option<Vec<&'a str>>> {
        let Some(text) = self.text(key) else { return Ok(None) };
        let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
        let parts = split(inner).with_context(|| format!("{}: {key}={text}", self.flag))?;
        Ok(Some(parts.into_iter().map(unquote).collect()))
    }
}

/// Splits at commas outside of brackets and quotes.
fn split(text: &str) -> anyhow::Result<Vec<&str>> {
    let (mut parts, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0u32, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => depth += 1,
            ']' if !quoted => match depth.checked_sub(1) {
                Some(outer) => depth = outer,
                None => bail!("a ']' has no '[' before it"),
            },
            ',' if !quoted && depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted || depth > 0 {
        bail!("a '{}' is not closed", if quoted { '"' } else { '[' });
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn unquote(text: &str) -> &str {
    text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<KeyValues<'_>> {
        KeyValues::parse("--test", text, &["size", "on", "list", "path"], &["iommu"])
    }

    #[test]
    fn values_are_taken_apart() {
        let kv = parse("size=2G,list=[a,b],on=off,path=\"x,y\"").expect("valid");
        assert_eq!(kv.size("size").expect("size"), Some(2 << 30));
        assert_eq!(kv.list("list").expect("list"), Some(vec!["a", "b"]));
        assert_eq!(kv.switch("on").expect("switch"), Some(false));
        assert_eq!(kv.text("path"), Some("x,y"));
        assert_eq!(kv.text("absent"), None);
    }

    #[test]
    fn errors_name_flag_value_and_fix() {
        let error = |text: &str| format!("{:#}", parse(text).err().expect("refused"));
        assert_eq!(
            error("sise=1"),
            "--test: there is no key 'sise'; it takes size, on, list, path"
        );
        assert_eq!(
            error("1G"),
            "--test: '1G' is not key=value; it takes size, on, list, path"
        );
        assert_eq!(
            error("size=1,"),
            "--test: a key=value is empty in 'size=1,'; it takes size, on, list, path"
        );
        assert!(error("size=1,size=2").contains("given twice"));
        assert!(error("list=[a").contains("not closed"));
        assert!(error("iommu=on").contains("not supported"));
        parse("iommu=off").expect("changes nothing");
        let number = |text: &str| {
            let kv = parse(text).expect("valid keys");
            kv.number::<u16>("size").map_err(|e| e.to_string())
        };
        assert_eq!(number("size=65535"), Ok(Some(65535)));
        assert_eq!(
            number("size=65536"),
            Err("--test: size=65536 is too large; write a smaller number".into())
        );
        for text in ["size=", "size=-1", "size=x", "size=1.5"] {
            assert_eq!(
                number(text),
                Err(format!("--test: {text} is no whole number; write digits only"))
            );
        }
        let kv = parse("on=maybe,size=1.5G").expect("valid keys");
        assert_eq!(
            kv.switch("on").expect_err("switch").to_string(),
            "--test: on=maybe is neither on nor off; write one of them"
        );
        assert!(format!("{:#}", kv.size("size").expect_err("size")).contains("'1.5G' is not a size"));
    }
}
