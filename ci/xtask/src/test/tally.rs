//! Counts tests of all kinds, shows each as it ends, and sums up.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It ran and all was right.
    Passed,
    /// It did not run, because of this.
    Skipped(String),
    /// It ran, and this was wrong.
    Failed(String),
}

/// The tests so far.
pub struct Tally {
    out: Box<dyn Write + Send>,
    passed: usize,
    skipped: Vec<(String, String)>,
    failed: Vec<String>,
}

impl Tally {
    /// No tests yet; what is shown goes to `out`.
    pub fn new(out: impl Write + Send + 'static) -> Self {
        Self {
            out: Box::new(out),
            passed: 0,
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Shows something that is not a result. A closed output is no reason to stop: the exit code
    /// still tells.
    pub fn show(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
    }

    /// Counts a test and prints its line; `time` is unknown for tests inside a larger program.
    pub fn add(&mut self, name: &str, verdict: Verdict, time: Option<Duration>) {
        let line = line(name, &verdict, time);
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Skipped(why) => self.skipped.push((name.to_owned(), why)),
            Verdict::Failed(_) => self.failed.push(name.to_owned()),
        }
        self.show(&line);
    }

    /// Counts tests that passed inside a larger program, on one line.
    pub fn add_passed(&mut self, name: &str, count: usize, time: Duration) {
        self.passed += count;
        if count > 0 {
            let name = format!("{name} ({count} {})", if count == 1 { "test" } else { "tests" });
            self.show(&line(&name, &Verdict::Passed, Some(time)));
        }
    }

    /// Counts what another one has counted and shown.
    pub fn merge(&mut self, other: Self) {
        self.passed += other.passed;
        self.skipped.extend(other.skipped);
        self.failed.extend(other.failed);
    }

    /// Does a part of the work; that it cannot be done is one failure, called `name`.
    pub fn guard(&mut self, name: &str, work: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(e) = work(self) {
            self.add(name, Verdict::Failed(format!("{e:#}")), None);
        }
    }

    /// Prints what did not pass and the counts; the exit code says whether all is well.
    pub fn finish(mut self, time: Duration) -> ExitCode {
        let mut text = String::from("\n");
        for (name, why) in &self.skipped {
            text += &format!("skipped: {name}: {}\n", why.lines().next().unwrap_or_default());
        }
        for name in &self.failed {
            text += &format!("FAILED: {name}\n");
        }
        text += &format!("in {:.0} s\n{}\n", time.as_secs_f64(), self.counts());
        self.show(&text);
        if self.is_success() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// The last line: `N passed, N failed, N skipped`.
    pub fn counts(&self) -> String {
        let (failed, skipped) = (self.failed.len(), self.skipped.len());
        format!("{} passed, {failed} failed, {skipped} skipped", self.passed)
    }

    fn is_success(&self) -> bool {
        self.failed.is_empty() && self.passed > 0
    }
}

fn line(name: &str, verdict: &Verdict, time: Option<Duration>) -> String {
    let time = time.map_or_else(|| " ".repeat(10), |t| format!("{:8.2} s", t.as_secs_f64()));
    match verdict {
        Verdict::Passed => format!("ok      {time}  {name}\n"),
        Verdict::Skipped(why) => format!("skipped {time}  {name}: {why}\n"),
        Verdict::Failed(why) => {
            let why: String = why.lines().map(|l| format!("    {l}\n")).collect();
            format!("FAILED  {time}  {name}\n{why}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::bail;

    #[test]
    fn counts_and_judges() {
        let mut tally = Tally::new(std::io::sink());
        assert!(!tally.is_success(), "nothing ran");
        tally.add("a", Verdict::Skipped("no KVM".into()), None);
        assert!(!tally.is_success(), "nothing passed");
        tally.add_passed("b", 3, Duration::ZERO);
        tally.guard("c", |tally| {
            tally.add("d", Verdict::Passed, Some(Duration::from_millis(1500)));
            Ok(())
        });
        assert!(tally.is_success());
        assert_eq!(tally.counts(), "4 passed, 0 failed, 1 skipped");
        tally.guard("e", |_| bail!("no compiler"));
        assert!(!tally.is_success());
        assert_eq!(tally.counts(), "4 passed, 1 failed, 1 skipped");
        let mut all = Tally::new(std::io::sink());
        all.add("f", Verdict::Passed, None);
        all.merge(tally);
        assert!(!all.is_success());
        assert_eq!(all.counts(), "5 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_failure_shows_why() {
        let time = Some(Duration::from_millis(1234));
        let text = line("x", &Verdict::Failed("one\ntwo".into()), time);
        assert_eq!(text, "FAILED      1.23 s  x\n    one\n    two\n");
    }
}
