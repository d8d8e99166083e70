//! Tables of text.

use crate::units::clean;

/// On which side a column's text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// Columns of text, as wide as what is in them.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<(&'static str, Side)>,
    least: Vec<usize>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table whose columns have these names.
    pub(crate) fn new(columns: &[(&'static str, Side)]) -> Self {
        Self {
            columns: columns.to_vec(),
            least: vec![0; columns.len()],
            rows: Vec::new(),
        }
    }

    /// Columns are at least so wide: a table that is shown again and again does not jump.
    pub(crate) fn at_least(mut self, widths: &[usize]) -> Self {
        for (least, width) in self.least.iter_mut().zip(widths) {
            *least = *width;
        }
        self
    }

    /// Adds a row; cells that are missing are empty.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let mut row: Vec<_> = cells.into_iter().map(|cell| clean(&cell)).collect();
        row.resize(self.columns.len(), String::new());
        self.rows.push(row);
    }

    /// Whether there is nothing to show.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Its lines, names first.
    pub(crate) fn lines(&self) -> Vec<String> {
        let names = self.columns.iter().map(|(name, _)| (*name).to_owned()).collect();
        let rows: Vec<&Vec<String>> = std::iter::once(&names).chain(&self.rows).collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|at| {
                let widest = rows.iter().map(|row| row[at].chars().count()).max();
                widest.unwrap_or(0).max(self.least[at])
            })
            .collect();
        let line = |row: &&Vec<String>| {
            let cells = row.iter().zip(&widths).zip(&self.columns);
            let padded = cells.map(|((cell, width), (_, side))| match side {
                Side::Left => format!("{cell:<width$}"),
                Side::Right => format!("{cell:>width$}"),
            });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        rows.iter().map(line).collect()
    }

    /// Its lines as one text.
    pub(crate) fn text(&self) -> String {
        self.lines().join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[("NAME", Side::Left), ("SIZE", Side::Right), ("NOTE", Side::Left)]);
        assert!(table.is_empty());
        table.row(["_disk0".into(), "5".into(), "größer".into()]);
        table.row(["a".into(), "12345".into()]);
        assert_eq!(
            table.text(),
            "\
NAME     SIZE  NOTE
_disk0      5  größer
a       12345
"
        );
    }

    #[test]
    fn columns_can_be_wider() {
        let mut table = Table::new(&[("A", Side::Right), ("B", Side::Right)]).at_least(&[3, 4]);
        table.row(["1".into(), "12345".into()]);
        assert_eq!(table.lines(), ["  A      B", "  1  12345"]);
    }

    #[test]
    fn what_is_shown_stays_in_its_line() {
        let mut table = Table::new(&[("A", Side::Left)]);
        table.row(["x\ny".into()]);
        assert_eq!(table.lines(), ["A", "x?y"]);
    }
}
