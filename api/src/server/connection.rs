//! One client.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, Shutdown};

use super::http::{CONTINUE, Reject, Response, write_stream_head};
use super::input::{Input, Sizes};
use super::later::{Later, Mailbox};
use super::{Call, Limits, Method, Peer, Served, Service, Stream};

/// Descriptors the kernel passes in one go (SCM_MAX_FD).
pub(super) const MAX_FDS: usize = 253;
/// How long a client that was told off may go on sending before we close: closing at once could take the response from it.
const LINGER: Duration = Duration::from_secs(1);
/// Requests of one client that are served before the others have a turn.
const TURN: usize = 16;
/// Bytes of a stream that are taken in one go. A client that reads slowly keeps us from having more than these and one item.
const PORTION: usize = 16 << 10;
/// Portions of a stream that are sent before other clients have a turn.
const STREAM_TURN: usize = 4;

/// What is to be done with the connection next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing until something happens.
    Wait,
    /// Another turn: there are more requests.
    Again,
    /// To be told whether it may have the stream it asks for: [`Connection::begin_stream`].
    Stream,
    /// It is over.
    Close,
}

/// What the connection waits for; each has its own patience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// The next request.
    Idle,
    /// The rest of a request.
    Request,
    /// An answer from another thread.
    Answer,
    /// The next item of a stream.
    Item,
    /// The client, to read what we sent.
    Reader,
    /// The client, to notice that we are done with it.
    Linger,
}

/// A connection with what was received and is to be sent. All its calls return at once.
pub(super) struct Connection {
    socket: OwnedFd,
    peer: Peer,
    input: Input<OwnedFd>,
    output: Vec<u8>,
    /// Bytes of `output` that are sent.
    sent: usize,
    /// A request was taken whose response is not there.
    answering: bool,
    /// What is sent from now on, in the place of responses.
    stream: Option<Box<dyn Stream>>,
    /// Whether the client wants to go on after the response to the request at hand.
    keep_alive: bool,
    /// Nothing is read any more, but what comes is thrown away.
    lingering: bool,
    /// The client sends no more.
    end_of_input: bool,
    wait: Wait,
    since: Instant,
    /// What the event loop watches it for.
    pub(super) watched: EventFlags,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, peer: Peer, limits: &Limits) -> Self {
        let sizes = Sizes {
            head: limits.head,
            body: limits.body,
            fds: MAX_FDS,
        };
        Self {
            socket,
            peer,
            input: Input::new(sizes),
            output: Vec::new(),
            sent: 0,
            answering: false,
            stream: None,
            keep_alive: true,
            lingering: false,
            end_of_input: false,
            wait: Wait::Idle,
            since: Instant::now(),
            watched: EventFlags::empty(),
        }
    }

    /// What the event loop should watch it for. That the client is gone is always reported.
    pub(super) fn interest(&self) -> EventFlags {
        match self.wait {
            Wait::Reader => EventFlags::OUT,
            // Who does not get its answer does not get the next one either; the kernel holds what it sends.
            Wait::Answer | Wait::Item => EventFlags::empty(),
            Wait::Idle | Wait::Request | Wait::Linger => EventFlags::IN,
        }
    }

    /// Since when it could be closed without anybody losing anything, if it could.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        (self.wait == Wait::Idle).then_some(self.since)
    }

    /// Whether it is sent a stream, or waits for the permission.
    pub(super) fn is_stream(&self) -> bool {
        self.stream.is_some()
    }

    /// Whether it is sent a stream and everything so far was sent.
    pub(super) fn wants_item(&self) -> bool {
        self.is_stream() && !self.has_output()
    }

    /// When its stream has another item, if that is known.
    pub(super) fn item_due(&self) -> Option<Instant> {
        let stream = self.stream.as_ref().filter(|_| !self.has_output())?;
        stream.due()
    }

    /// Since when the client of a stream has left what it was sent unread.
    pub(super) fn stuck_since(&self) -> Option<Instant> {
        (self.is_stream() && self.wait == Wait::Reader).then_some(self.since)
    }

    /// Whether something is not sent yet.
    pub(super) fn has_output(&self) -> bool {
        self.sent < self.output.len()
    }

    /// When patience ends.
    pub(super) fn deadline(&self, limits: &Limits) -> Option<Instant> {
        let patience = match self.wait {
            Wait::Idle => limits.idle,
            Wait::Request => limits.request,
            // A stream costs no more for being read slowly.
            Wait::Reader if self.is_stream() => return None,
            Wait::Reader => limits.unread,
            Wait::Linger => LINGER,
            Wait::Answer | Wait::Item => return None,
        };
        self.since.checked_add(patience)
    }

    /// Patience has ended.
    pub(super) fn expire(&mut self) -> Next {
        if self.wait != Wait::Request {
            return Next::Close;
        }
        self.reject(&Reject::new(408, "the request did not arrive in time"));
        match self.flush() {
            Ok(()) => self.settle(),
            Err(_) => Next::Close,
        }
    }

    /// The socket has something for us: `events`.
    pub(super) fn on_event(
        &mut self,
        events: EventFlags,
        service: &mut dyn Service,
        mailbox: &Mailbox,
        id: u64,
    ) -> Next {
        let gone = events.intersects(EventFlags::HUP | EventFlags::ERR);
        if gone && matches!(self.wait, Wait::Answer | Wait::Item) {
            return Next::Close;
        }
        if self.wait != Wait::Reader && (gone || events.intersects(EventFlags::IN)) && self.receive().is_err() {
            return Next::Close;
        }
        self.advance(service, mailbox, id)
    }

    /// The answer of another thread.
    pub(super) fn on_response(
        &mut self,
        response: &Response,
        service: &mut dyn Service,
        mailbox: &Mailbox,
        id: u64,
    ) -> Next {
        if !self.answering {
            return Next::Wait;
        }
        self.respond(response);
        self.advance(service, mailbox, id)
    }

    /// Begins the stream that the client asked for, or tells it why it cannot have one.
    pub(super) fn begin_stream(&mut self, allowed: Result<(), &Response>) -> Next {
        match allowed {
            Ok(()) => {
                self.answering = false;
                write_stream_head(&mut self.output);
                // Nothing else will be served here.
                self.input.clear();
                self.pump()
            }
            Err(response) => {
                self.stream = None;
                self.respond(response);
                // In a turn of its own: there may be many requests for a stream, one behind the other.
                Next::Again
            }
        }
    }

    /// Sends as much of the stream as there is and the client takes.
    pub(super) fn pump(&mut self) -> Next {
        for _ in 0..STREAM_TURN {
            if self.flush().is_err() {
                return Next::Close;
            }
            match &mut self.stream {
                Some(stream) if self.output.is_empty() => stream.fill(PORTION, &mut self.output),
                _ => return self.settle(),
            }
            if self.output.is_empty() {
                return self.settle();
            }
        }
        match self.settle() {
            Next::Wait if !self.has_output() => Next::Again,
            next => next,
        }
    }

    /// Sends what there is, serves what is there.
    pub(super) fn advance(&mut self, service: &mut dyn Service, mailbox: &Mailbox, id: u64) -> Next {
        if self.is_stream() {
            return self.pump();
        }
        for _ in 0..TURN {
            if self.flush().is_err() {
                return Next::Close;
            }
            if self.has_output() || self.answering || self.lingering {
                return self.settle();
            }
            match self.input.next() {
                Err(reject) => self.reject(&reject),
                Ok(Some(whole)) => {
                    let fds = self.input.take_fds(&whole);
                    let method = whole.head.method;
                    self.keep_alive = whole.head.keep_alive;
                    self.answering = true;
                    let call = Call {
                        method,
                        path: &whole.head.path,
                        query: &whole.head.query,
                        body: self.input.bytes(whole.body.clone()),
                        fds,
                        peer: self.peer,
                    };
                    let served = service.serve(call, &|| Later::new(mailbox.clone(), id));
                    self.input.take(&whole);
                    // The patience with the next request begins now.
                    self.since = Instant::now();
                    match served {
                        Served::Now(response) if method == Method::Head => self.respond(&response.without_body()),
                        Served::Now(response) => self.respond(&response),
                        Served::Stream(stream) => {
                            self.stream = Some(stream);
                            return Next::Stream;
                        }
                        Served::Later => {}
                    }
                }
                Ok(None) if self.end_of_input => return Next::Close,
                Ok(None) if self.input.wants_continue() => self.output.extend_from_slice(CONTINUE),
                Ok(None) => return self.settle(),
            }
        }
        self.settle();
        Next::Again
    }

    fn respond(&mut self, response: &Response) {
        self.answering = false;
        response.write(&mut self.output, self.keep_alive);
        if !self.keep_alive {
            self.linger();
        }
    }

    fn reject(&mut self, reject: &Reject) {
        reject.response().write(&mut self.output, false);
        self.linger();
    }

    fn linger(&mut self) {
        self.lingering = true;
        self.input.clear();
    }

    /// Finds out what it waits for now. It sends nothing: were output to go out here, requests that waited for it would wait for ever.
    fn settle(&mut self) -> Next {
        let wait = if self.has_output() {
            Wait::Reader
        } else if self.lingering {
            if self.end_of_input || rustix::net::shutdown(&self.socket, Shutdown::Write).is_err() {
                return Next::Close;
            }
            Wait::Linger
        } else if self.is_stream() {
            Wait::Item
        } else if self.answering {
            Wait::Answer
        } else if self.input.is_empty() {
            Wait::Idle
        } else {
            Wait::Request
        };
        if wait != self.wait {
            self.wait = wait;
            self.since = Instant::now();
        }
        Next::Wait
    }

    /// Sends as much as the client takes.
    fn flush(&mut self) -> Result<(), Errno> {
        while self.has_output() {
            match rustix::net::send(&self.socket, &self.output[self.sent..], SendFlags::NOSIGNAL) {
                Ok(n) => {
                    self.sent += n;
                    self.since = Instant::now();
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.sent = 0;
        self.output.clear();
        Ok(())
    }

    /// Takes one portion of what the client sent.
    fn receive(&mut self) -> Result<(), Errno> {
        let socket = &self.socket;
        let mut truncated = false;
        let received = self.input.receive(|buffer, fds| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(buffer)];
            let message = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            truncated = message.flags.contains(ReturnFlags::CTRUNC);
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            Ok(message.bytes)
        });
        match received {
            Ok(0) => self.end_of_input = true,
            Ok(_) if self.lingering => self.input.clear(),
            Ok(_) if truncated => self.reject(&Reject::new(
                400,
                "not all descriptors could be received: there are too many, or this process has too many open",
            )),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
