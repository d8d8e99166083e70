//! `trictl jobs`.

use std::collections::HashMap;
use std::thread;
use std::time::Duration;

use triarch_api::Operation;
use triarch_api::jobs::{Job, JobState, Timestamp};
use triarch_client::Client;

use crate::output::{Failure, print};
use crate::table::{Side, Table};
use crate::units::{bytes, clean, duration};

/// How often jobs are looked at.
const PERIOD: Duration = Duration::from_millis(200);

/// Shows jobs once, or their changes until all have ended.
pub(crate) fn run(client: &mut Client, id: Option<u64>, watch: bool, json: bool) -> Result<(), Failure> {
    let target = id.map_or_else(|| "vm.jobs".to_owned(), |id| format!("vm.job/{id}"));
    if watch {
        return follow(client, &target, id.is_some(), json);
    }
    let body = client.get(&target)?;
    if json {
        return print(&body);
    }
    print(&table(&understood(&target, &body, id.is_some())?))
}

/// The jobs that carry out `operation`. A VMM that does not know jobs has none.
pub(crate) fn of(client: &mut Client, operation: Operation) -> Vec<Job> {
    let jobs: Vec<Job> = client.get_as("vm.jobs").unwrap_or_default();
    jobs.into_iter().filter(|job| job.kind == operation.name()).collect()
}

/// Shows one job.
pub(crate) fn show(job: &Job, json: bool) -> Result<(), Failure> {
    match json {
        true => print(&serde_json::to_string(job).unwrap_or_default()),
        false => print(&line(job)),
    }
}

fn understood(target: &str, body: &str, single: bool) -> Result<Vec<Job>, Failure> {
    let jobs = if single {
        serde_json::from_str(body).map(|job| vec![job])
    } else {
        serde_json::from_str(body)
    };
    let target = target.to_owned();
    jobs.map_err(|source| triarch_client::Error::Body { target, source }.into())
}

/// A line for each change, until there is nothing under way.
fn follow(client: &mut Client, target: &str, single: bool, json: bool) -> Result<(), Failure> {
    let mut seen: HashMap<u64, Job> = HashMap::new();
    loop {
        let jobs = understood(target, &client.get(target)?, single)?;
        for job in &jobs {
            let known = seen.insert(job.id, job.clone());
            // Of those that had ended before there is nothing to follow.
            let news = known.as_ref() != Some(job) && (single || known.is_some() || job.state == JobState::Running);
            if news && json {
                print(&serde_json::to_string(job).unwrap_or_default())?;
            } else if news {
                print(&line(job))?;
            }
        }
        if !jobs.iter().any(|job| job.state == JobState::Running) {
            let failed = jobs.iter().find(|job| single && job.state == JobState::Failed);
            return match failed {
                Some(job) => Err(Failure::Failed(outcome(job))),
                None => Ok(()),
            };
        }
        thread::sleep(PERIOD);
    }
}

fn outcome(job: &Job) -> String {
    let error = job.error.as_deref().unwrap_or("for no known reason");
    format!("job {} ({}) failed: {error}", job.id, job.kind)
}

fn line(job: &Job) -> String {
    let Job { id, kind, .. } = job;
    let mut parts = vec![format!("{id} {kind}"), state(job).to_owned()];
    parts.extend(job.phase.clone());
    parts.push(progress(job));
    parts.extend(job.error.clone());
    parts.retain(|part| !part.is_empty());
    clean(&parts.join(", "))
}

fn table(jobs: &[Job]) -> String {
    if jobs.is_empty() {
        return "No job is under way, and none has ended lately.\n".to_owned();
    }
    let mut table = Table::new(&[
        ("ID", Side::Right),
        ("KIND", Side::Left),
        ("STATE", Side::Left),
        ("STARTED", Side::Right),
        ("TOOK", Side::Right),
        ("PHASE", Side::Left),
        ("PROGRESS", Side::Left),
        ("ERROR", Side::Left),
    ]);
    for job in jobs {
        let started = seconds(job.started);
        let took = job
            .ended
            .map_or_else(|| "-".to_owned(), |ended| duration((seconds(ended) - started).max(0.0)));
        table.row([
            job.id.to_string(),
            job.kind.clone(),
            state(job).to_owned(),
            format!("{started:.3} s"),
            took,
            job.phase.clone().unwrap_or_default(),
            progress(job),
            job.error.clone().unwrap_or_default(),
        ]);
    }
    table.text()
}

fn state(job: &Job) -> &'static str {
    match job.state {
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
    }
}

fn seconds(time: Timestamp) -> f64 {
    Duration::new(time.secs, time.nanos.min(999_999_999)).as_secs_f64()
}

/// How far a job is: `3 of 7 devices`.
pub(crate) fn progress(job: &Job) -> String {
    let Some(progress) = &job.progress else {
        return String::new();
    };
    if progress.unit == "bytes" {
        return format!("{} of {}", bytes(progress.done), bytes(progress.total));
    }
    format!("{} of {} {}", progress.done, progress.total, progress.unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOBS: &str = r#"[
        {"id":1,"kind":"vm.boot","state":"done","phase":"kernel","progress":null,
         "started":{"secs":1,"nanos":500000000},"ended":{"secs":1,"nanos":504000000},"error":null},
        {"id":2,"kind":"vm.boot","state":"running","phase":"memory",
         "progress":{"done":1048576,"total":4194304,"unit":"bytes"},
         "started":{"secs":3,"nanos":0},"ended":null,"error":null},
        {"id":3,"kind":"vm.delete","state":"failed","phase":null,"progress":{"done":1,"total":3,"unit":"devices"},
         "started":{"secs":3,"nanos":0},"ended":{"secs":5,"nanos":0},"error":"no"}]"#;

    #[test]
    fn jobs_are_a_table() {
        let jobs = understood("vm.jobs", JOBS, false).expect("jobs");
        assert_eq!(
            table(&jobs),
            "\
ID  KIND       STATE    STARTED    TOOK  PHASE   PROGRESS        ERROR
 1  vm.boot    done     1.500 s  4.0 ms  kernel
 2  vm.boot    running  3.000 s       -  memory  1 MiB of 4 MiB
 3  vm.delete  failed   3.000 s   2.0 s          1 of 3 devices  no
"
        );
        assert_eq!(line(&jobs[1]), "2 vm.boot, running, memory, 1 MiB of 4 MiB");
        assert_eq!(outcome(&jobs[2]), "job 3 (vm.delete) failed: no");
        assert!(table(&[]).starts_with("No job"));
        assert!(understood("vm.jobs", "{}", false).is_err());
    }
}
