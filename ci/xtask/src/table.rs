//! Tables for people.

/// Aligns the cells of `lines` in columns and draws a rule under the first line.
pub fn format(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (n, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
        if n == 0 {
            let rules = widths.iter().map(|width| "-".repeat(*width));
            text += &rules.collect::<Vec<_>>().join("  ");
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let line = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let text = format(&[line(["", "amd"]), line(["kernel", "6.1"]), line(["a", ""])]);
        assert_eq!(text, "        amd\n------  ---\nkernel  6.1\na\n");
    }
}
