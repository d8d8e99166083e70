//! What of devices of the host is saved: what the guest has of them, and what they are, which only their drivers understand.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use triarch_arch::HexBytes;
use triarch_pci::MsiXStateV1;
use triarch_state::{DeviceFile, Kind, Payloads, SnapshotWriter};
use triarch_vfio::{HostDevice, Mover, Options, Piece, SavedFunction, VfioPci};

use super::devices::{SavedDevices, carry};
use crate::MachineError;
use crate::devices::Host;

/// A device of the host, by the device's id.
const HOST: Kind = Kind::new("host-device", 1);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HostDeviceV1 {
    /// Configuration space, as the guest has it.
    registers: HexBytes,
    /// Bytes of its BARs.
    bars: [u64; 6],
    #[serde(default, skip_serializing_if = "Option::is_none")]
    msix: Option<MsiXStateV1>,
    /// What it is, if that is in a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<DeviceFile>,
}

/// Saves `function`, of the device `id`, which stands still.
pub(crate) fn save(
    id: &str,
    function: &VfioPci,
    payloads: &mut Payloads,
    writer: Option<&mut SnapshotWriter>,
) -> Result<(), MachineError> {
    let mover = function.host().mover().map_err(|error| carry(id, error.into()))?;
    mover.check_still().map_err(|error| carry(id, error.into()))?;
    let state = writer.map(|writer| {
        let written = writer.device(|buffer| read(&mover, buffer));
        mover.finish();
        written
    });
    // Memory is saved after this, and nobody may write there.
    mover.check_still().map_err(|error| carry(id, error.into()))?;
    let SavedFunction { registers, bars, msix } = function.save();
    let saved = HostDeviceV1 {
        registers: HexBytes(registers),
        bars,
        msix,
        state: state.transpose()?,
    };
    Ok(payloads.put(HOST, id, &saved)?)
}

fn read(mover: &Mover, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match mover.read(buffer).map_err(io::Error::other)? {
            None => return Ok(0),
            // It begins, and no more.
            Some(Piece { len: 0, .. }) => {}
            Some(Piece { len, .. }) => return Ok(len),
        }
    }
}

impl SavedDevices {
    /// Makes `device`, which is called `id`, what was saved. One whose state did not come in a file has taken it by now.
    pub(crate) fn host_function(
        &mut self,
        id: &str,
        device: &Arc<HostDevice>,
        host: &Host,
        options: Options,
    ) -> Result<VfioPci, MachineError> {
        let HostDeviceV1 {
            registers: HexBytes(registers),
            bars,
            msix,
            state,
        } = self.payloads.take(HOST, id)?;
        let mover = device.mover().map_err(|error| carry(id, error.into()))?;
        if let Some(file) = state {
            let files = self
                .files
                .as_ref()
                .ok_or_else(|| carry(id, "its state is in no snapshot".into()))?;
            mover.begin_load().map_err(|error| carry(id, error.into()))?;
            files.read(&file, |part| mover.load(part).map_err(io::Error::other))?;
        }
        mover.finish_load().map_err(|error| carry(id, error.into()))?;
        let saved = SavedFunction { registers, bars, msix };
        let function = VfioPci::restore(device, host.vm.clone(), &host.router, options, &saved);
        function.map_err(|error| carry(id, error.into()))
    }
}
