//! The messages of vhost-user, as QEMU's docs/interop/vhost-user.rst has them ("the protocol's text"): what the front end
//! (`triarch-vhost-user`) and the back end of the daemons (`triarch-daemon`) have in common.
//!
//! Numbers, layouts and limits, nothing else: no sockets, and no knowledge of what a message does. Names are those of the text without
//! their `VHOST_USER_`, so that they can be found there.
//!
//! All numbers are of the machine's byte order, which is little-endian on every host Triarch runs on.

mod features;
mod header;
mod payload;
mod request;

pub use features::{LOG_ALL, PROTOCOL_FEATURES, protocol};
pub use header::{HEADER, Header, NEED_REPLY, REPLY, message};
pub use payload::{
    ConfigRange, InflightShape, LogArea, Payload, Reader, Region, StateAnswer, StateTransfer, VringAddress, VringFd,
    VringState,
};
pub use request::{BACKEND_CONFIG_CHANGE_MSG, Request};

/// Regions in one SET_MEM_TABLE at most ("Memory regions description").
pub const TABLE_REGIONS: usize = 8;
/// Descriptors with one message at most: one for each region of a SET_MEM_TABLE.
pub const MAX_FDS: usize = TABLE_REGIONS;
/// Bytes of a configuration space, as far as the protocol goes.
pub const MAX_CONFIG: u32 = 256;
/// More bytes than the payload of any request of a front end has: a configuration space, or a table of memory.
pub const MAX_REQUEST: usize = 1024;
/// More bytes than the payload of any answer to one has.
pub const MAX_ANSWER: usize = 4096;
