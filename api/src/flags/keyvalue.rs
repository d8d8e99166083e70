//! The `key=value,key=value` dialect of device flags.
//!
//! Commas inside of `[...]` and `"..."` do not separate. Lists are `[a,b]`, switches `on` and `off`.

use std::fmt::Display;
use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

use super::FlagError;
use crate::parse_size;

/// One flag's value, taken apart.
pub struct KeyValues<'a> {
    flag: &'static str,
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> KeyValues<'a> {
    /// Takes `text` apart. Keys beside `known` are errors. Keys in `elsewhere` exist in Cloud Hypervisor and not here yet: they are
    /// accepted with the value that changes nothing.
    pub fn parse(flag: &'static str, text: &'a str, known: &[&str], elsewhere: &[&str]) -> Result<Self, FlagError> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        let refuse = |problem| Err(FlagError::new(flag, problem));
        let takes = || format!("it takes {}", known.join(", "));
        for part in split(text).map_err(|problem| FlagError::new(flag, format!("{problem} in '{text}'")))? {
            if part.is_empty() {
                return refuse(format!("a key=value is empty in '{text}'; {}", takes()));
            }
            let Some((key, value)) = part.split_once('=') else {
                return refuse(format!("'{part}' is not key=value; {}", takes()));
            };
            if pairs.iter().any(|(k, _)| *k == key) {
                return refuse(format!("'{key}' is given twice; give it once"));
            }
            if elsewhere.contains(&key) {
                if !matches!(value, "off" | "false" | "0") {
                    return refuse(format!(
                        "{key}={value} is not supported by this version; leave {key} out"
                    ));
                }
            } else if known.contains(&key) {
                pairs.push((key, unquote(value)));
            } else {
                return refuse(format!("there is no key '{key}'; {}", takes()));
            }
        }
        Ok(Self { flag, pairs })
    }

    /// The text of `key`.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    /// `key` as a value that parses itself.
    pub fn get<T: FromStr>(&self, key: &str) -> Result<Option<T>, FlagError>
    where
        T::Err: Display,
    {
        let Some(text) = self.text(key) else { return Ok(None) };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => self.refuse(format!("{key}={text} is invalid: {error}")),
        }
    }

    /// `key` as a whole number.
    pub fn number<T: FromStr<Err = ParseIntError>>(&self, key: &str) -> Result<Option<T>, FlagError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        match text.parse::<T>() {
            Ok(value) => Ok(Some(value)),
            Err(error) if *error.kind() == IntErrorKind::PosOverflow => {
                self.refuse(format!("{key}={text} is too large; write a smaller number"))
            }
            Err(_) => self.refuse(format!("{key}={text} is no whole number; write digits only")),
        }
    }

    /// `key` as a size in bytes.
    pub fn size(&self, key: &str) -> Result<Option<u64>, FlagError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        match parse_size(text) {
            Ok(size) => Ok(Some(size)),
            Err(error) => self.refuse(format!("{key} is invalid: {error}")),
        }
    }

    /// `key` as a switch.
    pub fn switch(&self, key: &str) -> Result<Option<bool>, FlagError> {
        match self.text(key) {
            None => Ok(None),
            Some("on" | "true") => Ok(Some(true)),
            Some("off" | "false") => Ok(Some(false)),
            Some(other) => self.refuse(format!("{key}={other} is neither on nor off; write one of them")),
        }
    }

    /// `key` as a list: `[a,b]`, or one value.
    pub fn list(&self, key: &str) -> Result<Option<Vec<&'a str>>, FlagError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        let inner = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
        match split(inner) {
            Ok(parts) => Ok(Some(parts.into_iter().map(unquote).collect())),
            Err(problem) => self.refuse(format!("{problem} in {key}={text}")),
        }
    }

    /// An error of this flag.
    pub fn refuse<T>(&self, problem: String) -> Result<T, FlagError> {
        Err(FlagError::new(self.flag, problem))
    }
}

/// Splits at commas outside of brackets and quotes.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start, mut depth, mut quoted) = (Vec::new(), 0, 0u32, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '[' if !quoted => depth += 1,
            ']' if !quoted => match depth.checked_sub(1) {
                Some(outer) => depth = outer,
                None => return Err("a ']' has no '[' before it".to_owned()),
            },
            ',' if !quoted && depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted || depth > 0 {
        return Err(format!("a '{}' is not closed", if quoted { '"' } else { '[' }));
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

    fn parse(text: &str) -> Result<KeyValues<'_>, FlagError> {
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
        let error = |text: &str| parse(text).err().expect("refused").to_string();
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
        assert!(
            kv.size("size")
                .expect_err("size")
                .to_string()
                .contains("'1.5G' is not a size")
        );
    }
}
