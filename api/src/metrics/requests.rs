//! How clients of the API were served.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::Latencies;

/// Bounds that matter to clients: a question's median and its tail, what a client of the field notices, when it gives up.
const BOUNDS: [u64; 11] = [
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    1_000_000,
    5_000_000,
    50_000_000,
    200_000_000,
    1_000_000_000,
    10_000_000_000,
];

/// Requests that were answered, by route. There are only as many routes as the API has, so it stays small.
#[derive(Debug, Default)]
pub struct Requests(Mutex<BTreeMap<&'static str, RouteMetrics>>);

/// Requests of one route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RouteMetrics {
    /// How many got a status of each hundred, from 2xx to 5xx.
    pub(super) statuses: [u64; 4],
    pub(super) latency: Latencies,
}

/// Names of [`RouteMetrics::statuses`].
pub(super) const STATUSES: [&str; 4] = ["2xx", "3xx", "4xx", "5xx"];

impl Requests {
    /// Counts a request of `route` that was answered with `status` after `time`.
    pub fn answered(&self, route: &'static str, status: u16, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let mut routes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_route = routes.entry(route).or_insert_with(|| RouteMetrics {
            statuses: [0; 4],
            latency: Latencies {
                bounds: &BOUNDS,
                buckets: vec![0; BOUNDS.len() + 1],
                sum: 0,
                min: u64::MAX,
                max: 0,
            },
        });
        let class = usize::from(status / 100).saturating_sub(2).min(STATUSES.len() - 1);
        of_route.statuses[class] += 1;
        let latency = &mut of_route.latency;
        latency.buckets[BOUNDS.partition_point(|bound| *bound < nanos)] += 1;
        latency.sum = latency.sum.saturating_add(nanos);
        latency.min = latency.min.min(nanos);
        latency.max = latency.max.max(nanos);
    }

    /// What was counted so far.
    pub(super) fn read(&self) -> Vec<(&'static str, RouteMetrics)> {
        let routes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        routes.iter().map(|(name, metrics)| (*name, metrics.clone())).collect()
    }
}
