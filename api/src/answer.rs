//! How requests reach whoever owns the VM, and how answers come back.

use std::fmt;
use std::sync::Arc;

use crate::events::EventLog;
use crate::jobs::JobBoard;
use crate::metrics::Metrics;
use crate::{ApiError, Reply, Request, VmInfo};

/// Owns the VM, as the server sees it. No call may wait for anything: one thread serves all clients.
pub trait Handler: Send + Sync {
    /// Takes a request and returns at once; `answer` is given from any thread, when the request was carried out or refused. Requests
    /// are carried out in the order in which they were taken.
    fn submit(&self, request: Request, answer: Answer);

    /// What `vm.info` tells now; `None` without a VM. It is the state after the last request that was answered, even while the next
    /// one is being carried out.
    fn info(&self) -> Option<Arc<VmInfo>>;

    /// What was counted so far. An owner that counts nothing need not say so.
    fn metrics(&self) -> Metrics {
        Metrics::default()
    }

    /// What happened so far, and will.
    fn events(&self) -> &Arc<EventLog>;

    /// Long work that is under way, or was.
    fn jobs(&self) -> &Arc<JobBoard>;
}

type Receiver = Box<dyn FnOnce(Result<Reply, ApiError>) + Send>;

/// The duty to answer a request. Dropped without an answer, it says that the VMM is shutting down: nobody waits for ever.
pub struct Answer(Option<Receiver>);

impl Answer {
    /// An answer that goes to `receiver`, which must neither block nor panic.
    pub fn new(receiver: impl FnOnce(Result<Reply, ApiError>) + Send + 'static) -> Self {
        Self(Some(Box::new(receiver)))
    }

    /// Gives the answer.
    pub fn send(mut self, result: Result<Reply, ApiError>) {
        if let Some(receiver) = self.0.take() {
            receiver(result);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(receiver) = self.0.take() {
            receiver(Err(ApiError::Failed("the VMM is shutting down".to_owned())));
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_dropped_answer_is_an_error_and_a_given_one_is_given_once() {
        let (sender, receiver) = channel();
        let other = sender.clone();
        drop(Answer::new(move |result| sender.send(result).expect("send")));
        Answer::new(move |result| other.send(result).expect("send")).send(Ok(Reply::Done));
        let results: Vec<_> = receiver.iter().collect();
        assert_eq!(results[0].as_ref().expect_err("dropped").status(), 500);
        assert_eq!(results[1..], [Ok(Reply::Done)]);
    }
}
