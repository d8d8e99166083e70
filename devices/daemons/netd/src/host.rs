//! Opening what ports of the host lead to.

use std::os::fd::OwnedFd;

use triarch_net::{Offloads, PacketBackend, Tap, TapError};

use crate::offload::{Accepts, HEADER};
use crate::plane::HostEnd;

/// What puts an interface back as it was, when it is dropped. That takes calls that the switch's thread does not have.
pub type Keep = Box<dyn Send>;

/// A tap: the interface `name`, or the one that `fds` are queues of.
pub fn tap(name: &str, queues: u16, mtu: Option<u16>, fds: Vec<OwnedFd>) -> Result<(HostEnd, Keep), TapError> {
    let mut tap = match fds.is_empty() {
        true => Tap::open(Some(name), queues.into())?,
        false => Tap::from_fds(fds)?,
    };
    if let Some(mtu) = mtu {
        tap.set_mtu(mtu)?;
    }
    tap.bring_up()?;
    // What a receiver does not take undone is done here.
    let offloads = tap.offloads();
    tap.set_offloads(offloads).map_err(|source| TapError::System {
        what: "switch on the offloads of a tap",
        source,
    })?;
    for index in 0..tap.queues().len() {
        tap.set_queue_active(index, true).map_err(|source| TapError::System {
            what: "attach a queue of a tap",
            source,
        })?;
    }
    let end = HostEnd {
        queues: tap.queues().to_vec(),
        header: HEADER,
        tags_beside: false,
        accepts: Accepts {
            uso4: offloads.contains(Offloads::USO4),
            uso6: offloads.contains(Offloads::USO6),
            ..Accepts::ALL
        },
        label: format!("tap {}", tap.name()),
    };
    Ok((end, Box::new(tap)))
}
