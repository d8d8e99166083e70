//! Client of the agent that runs in test machines: commands and files over one stream.
//!
//! The protocol is that of [`triarch_guest_init::proto`]. One thread reads replies and hands them
//! to whoever waits for them, so several threads may use one [`Agent`] at the same time.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};
use triarch_guest_init::proto::{self, Command, Reply, Request};
pub use triarch_guest_init::proto::{Exit, Machine, Power};

/// How often the greeting is repeated: what is sent before the agent runs may be lost.
const GREETING: Duration = Duration::from_millis(250);
/// A write that makes no progress for this long means that the machine hangs.
const WRITE_LIMIT: Duration = Duration::from_secs(60);
/// What a machine is given beyond a command's own limit before it counts as hanging.
const GRACE: Duration = Duration::from_secs(30);
/// Limit of commands for which none is set, and of requests other than commands.
const LIMIT: Duration = Duration::from_secs(120);
/// Replies that may wait for one reader before the stream is held back.
const QUEUE: usize = 64;
/// Route of replies to the greeting; requests count from 1.
const GREETING_ID: u64 = 0;

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The stream broke: the machine or what connects us to it is gone.
    #[error("the agent's stream ended: {0}")]
    Lost(String),
    /// The machine did not answer in time.
    #[error("no answer from the agent in {0:?}")]
    Silent(Duration),
    /// The agent answered that it cannot do it.
    #[error("the agent refused: {0}")]
    Refused(String),
    /// A command that had to succeed did not.
    #[error("`{command}` failed in the machine ({exit:?}):\n{output}")]
    Failed {
        /// What was run.
        command: String,
        /// How it ended.
        exit: Exit,
        /// All that it printed.
        output: String,
    },
    /// The agent broke the protocol.
    #[error("unexpected reply {0:?}")]
    Unexpected(Box<Reply>),
}

impl AgentError {
    /// Whether the machine itself is at fault, and not what was asked of it.
    pub fn is_machine_failure(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Silent(_) | Self::Unexpected(_))
    }
}

/// A command to run in the machine.
#[derive(Clone, Debug)]
pub struct Exec {
    command: Command,
    input: Vec<u8>,
    limit: Option<Duration>,
}

impl Exec {
    /// Runs a program with its arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        let argv = argv.into_iter().map(Into::into).collect();
        let command = Command {
            argv,
            ..Command::default()
        };
        Self {
            command,
            input: Vec::new(),
            limit: None,
        }
    }

    /// Runs a script with `/bin/sh`; the first failing command ends it.
    pub fn shell(script: &str) -> Self {
        Self::new(["/bin/sh", "-ec", script])
    }

    /// Adds a variable to the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, path: &str) -> Self {
        self.command.cwd = Some(path.into());
        self
    }

    /// Gives standard input.
    #[must_use]
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = input.into();
        self
    }

    /// Kills the command after this time; without it, after two minutes or [`Agent::within`].
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }
}

/// Which output a piece of data was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

type Message = (Reply, Vec<u8>);

#[derive(Default)]
struct Routes {
    open: HashMap<u64, SyncSender<Message>>,
    /// Why there will be no more replies.
    ended: Option<String>,
}

struct Shared {
    writer: Mutex<UnixStream>,
    routes: Mutex<Routes>,
}

/// A session with a machine's agent. Dropping it ends the session, and with it the commands that
/// still run, unless they were detached.
pub struct Agent {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
    machine: Machine,
    next: AtomicU64,
    limit: Duration,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    /// Greets the agent on `stream` until it answers. What comes before its answer is skipped: a
    /// serial line may carry boot messages.
    ///
    /// # Errors
    /// No answer within `limit`, or the stream ended.
    pub fn connect(stream: UnixStream, limit: Duration) -> Result<Self, AgentError> {
        let lost = |e: io::Error| AgentError::Lost(e.to_string());
        stream.set_read_timeout(None).map_err(lost)?;
        stream.set_write_timeout(Some(WRITE_LIMIT)).map_err(lost)?;
        let reading = stream.try_clone().map_err(lost)?;
        let shared = Arc::new(Shared {
            writer: Mutex::new(stream),
            routes: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        let reader = thread::Builder::new()
            .name("agent".into())
            .spawn(move || theirs.read(reading))
            .map_err(lost)?;
        // From here on, dropping the agent ends the thread.
        let mut agent = Self {
            shared,
            reader: Some(reader),
            machine: Machine::default(),
            next: AtomicU64::new(GREETING_ID + 1),
            limit: LIMIT,
        };
        agent.machine = agent.greet(limit)?;
        Ok(agent)
    }

    /// The same session, in which nothing takes longer than `limit`, unless a command says so: that the machine hangs is seen sooner.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The machine as it was when the session began.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Writes a file; missing directories are made.
    ///
    /// # Errors
    /// The agent's refusal, or the loss of the machine.
    pub fn put(&self, path: &str, mode: u32, content: &[u8]) -> Result<(), AgentError> {
        let id = self.id();
        let request = Request::Put {
            id,
            path: path.into(),
            mode,
        };
        self.call(id, &request, content, self.limit)?.done()
    }

    /// Reads a file.
    ///
    /// # Errors
    /// The agent's refusal, or the loss of the machine.
    pub fn get(&self, path: &str) -> Result<Vec<u8>, AgentError> {
        let id = self.id();
        let call = self.call(id, &Request::Get { id, path: path.into() }, b"", self.limit)?;
        let mut content = Vec::new();
        loop {
            match call.next()? {
                (Reply::Data { .. }, data) => content.extend(data),
                (Reply::Done { .. }, _) => return Ok(content),
                (reply, _) => return Err(unexpected(reply)),
            }
        }
    }

    /// Runs a command to its end, handing over its output as it comes.
    ///
    /// # Errors
    /// The command cannot be started, or the loss of the machine. A command that fails or runs out
    /// of time is no error here: see [`Exit`].
    pub fn exec(&self, exec: &Exec, on_output: impl FnMut(Stream, &[u8])) -> Result<Exit, AgentError> {
        self.start(exec)?.wait(on_output)
    }

    /// Runs a command to its end and collects its output.
    ///
    /// # Errors
    /// As [`Agent::exec`].
    pub fn output(&self, exec: &Exec) -> Result<Output, AgentError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = self.exec(exec, |stream, data| match stream {
            Stream::Stdout => stdout.extend_from_slice(data),
            Stream::Stderr => stderr.extend_from_slice(data),
        })?;
        Ok(Output { exit, stdout, stderr })
    }

    /// Runs a command that has to succeed, and gives what it printed to standard output, without
    /// white space at the end.
    ///
    /// # Errors
    /// As [`Agent::exec`], and any end of the command but exit code 0.
    pub fn check(&self, exec: &Exec) -> Result<String, AgentError> {
        let Output { exit, stdout, stderr } = self.output(exec)?;
        let text = String::from_utf8_lossy(&stdout).trim_end().to_owned();
        if exit.success() {
            return Ok(text);
        }
        let command = exec.command.argv.join(" ");
        let output = text + &String::from_utf8_lossy(&stderr);
        Err(AgentError::Failed { command, exit, output })
    }

    /// Runs a shell script that has to succeed; see [`Agent::check`].
    ///
    /// # Errors
    /// As [`Agent::check`].
    pub fn shell(&self, script: &str) -> Result<String, AgentError> {
        self.check(&Exec::shell(script))
    }

    /// Starts a command and does not wait for it. Its output has to be taken: after some MiB that
    /// nobody took it holds up the whole session.
    ///
    /// # Errors
    /// The loss of the machine. That it cannot be started is told by [`Running::wait`].
    pub fn start(&self, exec: &Exec) -> Result<Running<'_>, AgentError> {
        let id = self.id();
        let limit = exec.limit.unwrap_or(self.limit);
        let mut command = exec.command.clone();
        command.timeout_ms = Some(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
        let request = Request::Exec { id, command };
        let call = self.call(id, &request, &exec.input, limit.saturating_add(GRACE))?;
        Ok(Running { call })
    }

    /// Starts a command that outlives the session, and gives its process in the machine. It has no
    /// time limit, and its output goes nowhere.
    ///
    /// # Errors
    /// The command cannot be started, or the loss of the machine.
    pub fn detach(&self, exec: &Exec) -> Result<u32, AgentError> {
        let id = self.id();
        let command = Command {
            detach: true,
            ..exec.command.clone()
        };
        let call = self.call(id, &Request::Exec { id, command }, &exec.input, LIMIT)?;
        match call.next()?.0 {
            Reply::Started { pid, .. } => Ok(pid),
            reply => Err(unexpected(reply)),
        }
    }

    /// Asks the machine to end. The machine goes some moments after this returns.
    ///
    /// # Errors
    /// The agent's refusal, or the loss of the machine before it answered.
    pub fn power(&self, action: Power) -> Result<(), AgentError> {
        let id = self.id();
        self.call(id, &Request::Power { id, action }, b"", LIMIT)?.done()
    }

    fn greet(&self, limit: Duration) -> Result<Machine, AgentError> {
        let start = Instant::now();
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let token = format!("{:x}.{:x}", std::process::id(), now.as_nanos());
        let receiver = self.shared.open(GREETING_ID)?;
        while start.elapsed() < limit {
            let request = Request::Hello { token: token.clone() };
            // Ends a line of noise, so that the greeting starts its own.
            self.shared.send_raw(b"\n")?;
            self.shared.send(&request, b"")?;
            match receiver.recv_timeout(GREETING) {
                Ok((Reply::Hello { token: answer, machine }, _)) if answer == token => {
                    self.shared.close(GREETING_ID);
                    return Ok(machine);
                }
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.shared.lost()),
            }
        }
        Err(AgentError::Silent(limit))
    }

    fn id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn call(&self, id: u64, request: &Request, data: &[u8], limit: Duration) -> Result<Call<'_>, AgentError> {
        let receiver = self.shared.open(id)?;
        // Before sending: a large file may take its time, but no more than that.
        let call = Call {
            agent: self,
            id,
            receiver,
            deadline: Instant::now() + limit,
            limit,
        };
        self.shared.send(request, data)?;
        Ok(call)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Fails if the other side closed first, which is as good.
        let _ = lock(&self.shared.writer).shutdown(Shutdown::Both);
        // A reader that waits for room in a route finds the route gone.
        lock(&self.shared.routes).open.clear();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// A command that runs in the machine. Dropping it does not end the command.
pub struct Running<'a> {
    call: Call<'a>,
}

impl Running<'_> {
    /// Waits for the command's end; see [`Agent::exec`].
    ///
    /// # Errors
    /// As [`Agent::exec`].
    pub fn wait(self, mut on_output: impl FnMut(Stream, &[u8])) -> Result<Exit, AgentError> {
        loop {
            match self.call.next()? {
                (Reply::Stdout { .. }, data) => on_output(Stream::Stdout, &data),
                (Reply::Stderr { .. }, data) => on_output(Stream::Stderr, &data),
                (Reply::Exit { exit, .. }, _) => return Ok(exit),
                (reply, _) => return Err(unexpected(reply)),
            }
        }
    }

    /// Waits for the next piece of output; `None` if the command ended instead.
    ///
    /// # Errors
    /// As [`Agent::exec`].
    pub fn next_output(&self) -> Result<Option<Vec<u8>>, AgentError> {
        match self.call.next()? {
            (Reply::Stdout { .. } | Reply::Stderr { .. }, data) => Ok(Some(data)),
            (Reply::Exit { .. }, _) => Ok(None),
            (reply, _) => Err(unexpected(reply)),
        }
    }

    /// Kills the command and its children.
    ///
    /// # Errors
    /// The agent's refusal, or the loss of the machine.
    pub fn kill(&self) -> Result<(), AgentError> {
        let (agent, exec) = (self.call.agent, self.call.id);
        let id = agent.id();
        agent.call(id, &Request::Kill { id, exec }, b"", LIMIT)?.done()
    }
}

/// A request under way.
struct Call<'a> {
    agent: &'a Agent,
    id: u64,
    receiver: Receiver<Message>,
    deadline: Instant,
    limit: Duration,
}

impl Call<'_> {
    fn next(&self) -> Result<Message, AgentError> {
        let wait = self.deadline.saturating_duration_since(Instant::now());
        match self.receiver.recv_timeout(wait) {
            Ok((Reply::Error { message, .. }, _)) => Err(AgentError::Refused(message)),
            Ok(message) => Ok(message),
            Err(RecvTimeoutError::Timeout) => Err(AgentError::Silent(self.limit)),
            Err(RecvTimeoutError::Disconnected) => Err(self.agent.shared.lost()),
        }
    }

    fn done(self) -> Result<(), AgentError> {
        match self.next()?.0 {
            Reply::Done { .. } => Ok(()),
            reply => Err(unexpected(reply)),
        }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.agent.shared.close(self.id);
    }
}

fn unexpected(reply: Reply) -> AgentError {
    AgentError::Unexpected(Box::new(reply))
}

impl Shared {
    fn open(&self, id: u64) -> Result<Receiver<Message>, AgentError> {
        let mut routes = lock(&self.routes);
        if let Some(why) = &routes.ended {
            return Err(AgentError::Lost(why.clone()));
        }
        let (sender, receiver) = sync_channel(QUEUE);
        routes.open.insert(id, sender);
        Ok(receiver)
    }

    fn close(&self, id: u64) {
        lock(&self.routes).open.remove(&id);
    }

    fn lost(&self) -> AgentError {
        let why = lock(&self.routes).ended.clone();
        AgentError::Lost(why.unwrap_or_else(|| "closed here".into()))
    }

    fn send(&self, request: &Request, data: &[u8]) -> Result<(), AgentError> {
        proto::write(&mut *lock(&self.writer), request, data).map_err(|e| self.broken(&e))
    }

    fn send_raw(&self, data: &[u8]) -> Result<(), AgentError> {
        lock(&self.writer).write_all(data).map_err(|e| self.broken(&e))
    }

    /// After a failed write the other side may wait for the rest of a message: nothing that follows
    /// would be understood.
    fn broken(&self, error: &io::Error) -> AgentError {
        let mut routes = lock(&self.routes);
        let why = routes.ended.get_or_insert_with(|| error.to_string()).clone();
        routes.open.clear();
        AgentError::Lost(why)
    }

    /// Hands replies to those who wait for them until the stream ends.
    fn read(&self, stream: UnixStream) {
        let mut reader = BufReader::with_capacity(proto::CHUNK, stream);
        let why = loop {
            match self.route(&mut reader) {
                Ok(true) => {}
                Ok(false) => break "the other side closed it".to_owned(),
                Err(e) => break e.to_string(),
            }
        };
        let mut routes = lock(&self.routes);
        routes.ended.get_or_insert(why);
        routes.open.clear();
    }

    fn route(&self, reader: &mut BufReader<UnixStream>) -> io::Result<bool> {
        let Some((reply, size)) = proto::read::<Reply>(&mut *reader)? else {
            return Ok(false);
        };
        if size > proto::CHUNK as u64 {
            return Err(io::Error::other(format!("a reply claims {size} bytes of data")));
        }
        let mut data = Vec::new();
        reader.by_ref().take(size).read_to_end(&mut data)?;
        let route = lock(&self.routes).open.get(&id_of(&reply)).cloned();
        if let Some(route) = route {
            // Nobody waits any more: the reply is of no interest.
            let _ = route.send((reply, data));
        }
        Ok(true)
    }
}

fn id_of(reply: &Reply) -> u64 {
    match reply {
        Reply::Hello { .. } => GREETING_ID,
        Reply::Stdout { id }
        | Reply::Stderr { id }
        | Reply::Data { id }
        | Reply::Started { id, .. }
        | Reply::Exit { id, .. }
        | Reply::Done { id }
        | Reply::Error { id, .. } => *id,
    }
}

/// Connects to a unix socket that may not exist or listen yet.
///
/// # Errors
/// It does not within `limit`.
pub fn connect_socket(path: impl Into<PathBuf>, limit: Duration) -> io::Result<UnixStream> {
    let path = path.into();
    let deadline = Instant::now() + limit;
    loop {
        match UnixStream::connect(&path) {
            Err(e) if Instant::now() >= deadline => {
                return Err(io::Error::new(e.kind(), format!("{}: {e}", path.display())));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
            stream => return stream,
        }
    }
}

#[cfg(test)]
mod tests;
