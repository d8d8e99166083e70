//! What the VMM says of itself over its API: jobs and how they end, metrics.

use crate::api::Api;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use std::thread;
use std::time::{Duration, Instant};

/// How often somebody who waits looks: at first often, for what is quick, then so.
const SLOWEST: Duration = Duration::from_millis(50);

/// Waits until `done` gives something.
///
/// # Errors
/// `what`, after `limit`; and those of `done`.
pub fn wait<T>(what: &str, limit: Duration, mut done: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = done()? {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "{what}");
        thread::sleep(pause);
        pause = (pause * 5 / 4).min(SLOWEST);
    }
}

impl Api {
    /// The last job of `kind`, once it has ended.
    ///
    /// # Errors
    /// There is none, or it still runs after `limit`.
    pub fn ended(&self, kind: &str, limit: Duration) -> Result<Value> {
        let mut last = Value::Null;
        wait("", limit, || {
            let jobs = self.get("vm.jobs")?;
            let mut jobs = jobs.as_array().context("no jobs")?.iter();
            let job = jobs.rfind(|job| job["kind"] == kind);
            last = job.with_context(|| format!("no job {kind}"))?.clone();
            Ok((last["state"] != "running").then(|| last.clone()))
        })
        .with_context(|| format!("the job does not end: {last}"))
    }

    /// The last job of `kind` ends well, and says this.
    ///
    /// # Errors
    /// As [`Api::ended`], or it ends otherwise.
    pub fn is_done(&self, kind: &str, limit: Duration, phase: &str) -> Result<()> {
        let job = self.ended(kind, limit)?;
        ensure!(job["state"] == "done" && job["phase"] == phase, "{job}, not {phase}");
        Ok(())
    }

    /// The last job of `kind` fails, with all of these words.
    ///
    /// # Errors
    /// As [`Api::ended`], or it ends otherwise.
    pub fn has_failed(&self, kind: &str, limit: Duration, words: &[&str]) -> Result<()> {
        let job = self.ended(kind, limit)?;
        let error = job["error"].as_str().unwrap_or_default();
        let has = words.iter().all(|word| error.contains(word));
        ensure!(job["state"] == "failed" && has, "{job}, not {words:?}");
        Ok(())
    }

    /// The value of a metric, if there is one of this name and labels.
    ///
    /// # Errors
    /// No answer, or the value is no whole number.
    pub fn metric(&self, name: &str) -> Result<Option<u64>> {
        let text = self.request("GET", "metrics", None)?.body;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.map(str::parse).transpose()?)
    }

    /// Sends what must be refused with `status` and a sentence that has the route and all of `words`.
    ///
    /// # Errors
    /// It is answered otherwise.
    pub fn refused(&self, route: &str, body: &Value, status: u16, words: &[&str]) -> Result<()> {
        let answer = self.request("PUT", route, Some(&body.to_string()))?;
        let what = || format!("{route} {body}: {} {}", answer.status, answer.body);
        ensure!(answer.status == status, "{}, not {status}", what());
        let error: Value = serde_json::from_str(&answer.body).with_context(what)?;
        let sentence = error["error"].as_str().unwrap_or_default();
        for word in words.iter().chain([&route]) {
            ensure!(sentence.contains(word), "no `{word}` in: {sentence}");
        }
        Ok(())
    }
}
