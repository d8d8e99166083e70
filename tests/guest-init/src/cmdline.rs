//! The kernel's command line.

/// The value of the last `key=value` in `line`, where a value, or the whole parameter, may stand in
/// double quotes to hold spaces (Linux, Documentation/admin-guide/kernel-parameters.rst).
pub fn value(line: &str, key: &str) -> Option<String> {
    parameters(line)
        .filter_map(|p| Some(p.strip_prefix(key)?.strip_prefix('=')?.to_owned()))
        .last()
}

fn parameters(line: &str) -> impl Iterator<Item = String> + '_ {
    let mut rest = line.trim();
    std::iter::from_fn(move || {
        rest = rest.trim_start();
        let mut quoted = false;
        let end = rest
            .find(|c: char| {
                quoted ^= c == '"';
                c.is_whitespace() && !quoted
            })
            .unwrap_or(rest.len());
        let (parameter, after) = rest.split_at(end);
        rest = after;
        (!parameter.is_empty()).then(|| parameter.replace('"', ""))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_values() {
        let line = "console=ttyS0 quiet triarch.run=\"echo hi; ls /\" \"a=b c\" console=hvc0\n";
        assert_eq!(value(line, "console").as_deref(), Some("hvc0"));
        assert_eq!(value(line, "triarch.run").as_deref(), Some("echo hi; ls /"));
        assert_eq!(value(line, "a").as_deref(), Some("b c"));
        assert_eq!(value(line, "quiet"), None);
        assert_eq!(value(line, "triarch"), None);
        assert_eq!(value("a=\"open", "a").as_deref(), Some("open"));
    }
}
