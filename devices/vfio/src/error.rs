//! Why a device of the host cannot be had.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::given::Kind;

/// Why a device of the host cannot be had. Each says what is to be done.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Nothing at the path.
    #[error(
        "there is no device at {}; give the path of one in /sys/bus/pci/devices, such as /sys/bus/pci/devices/0000:01:00.0, or of a \
         mediated one in /sys/bus/mdev/devices",
        .0.display()
    )]
    Absent(PathBuf),
    /// No IOMMU.
    #[error(
        "{0} is in no IOMMU group: the host has no IOMMU that works for it; switch it on in the firmware and on the kernel's command \
         line (intel_iommu=on on Intel)"
    )]
    NoGroup(String),
    /// VFIO's mode without an IOMMU.
    #[error(
        "{0} has no IOMMU behind it, only VFIO's unsafe mode without one, in which a guest could write to any memory of the host; switch \
         the host's IOMMU on"
    )]
    NoIommu(String),
    /// It belongs to a driver, or to nobody.
    #[error("{name} {owner}; give it to vfio-pci: {}", bind(.name, *.bound))]
    NotBound {
        /// Its name.
        name: String,
        /// Whose it is.
        owner: String,
        /// It has a driver that must let go of it first.
        bound: bool,
    },
    /// A mediated device of another kind.
    #[error(
        "{name} is a mediated device of the kind '{api}'; only those of the kind vfio-pci (device_api of its type) can be passed through"
    )]
    OtherKind {
        /// Its UUID.
        name: String,
        /// What it is like.
        api: String,
    },
    /// A mediated device without a driver.
    #[error("the mediated device {0} has no driver; load that of the device it is a part of, and make it anew")]
    Idle(String),
    /// VFIO is not there.
    #[error(
        "{path} cannot be opened; load the modules vfio-pci and vfio_iommu_type1, and let this user read and write it"
    )]
    NoVfio {
        /// The path.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Somebody else has it.
    #[error(
        "{name} is in use: another process has its IOMMU group {group} open; end that one, or give the guest another device"
    )]
    InUse {
        /// Its name.
        name: String,
        /// Number of its group.
        group: u32,
    },
    /// This guest has it.
    #[error("{0} is passed through to this guest already")]
    Twice(String),
    /// Others of its group belong to the host.
    #[error(
        "{name} cannot be separated from {others} in its IOMMU group {group}; give those to vfio-pci as well, or take their driver away"
    )]
    Shared {
        /// Its name.
        name: String,
        /// Number of its group.
        group: u32,
        /// The others, with their drivers.
        others: String,
    },
    /// Another device of this guest goes with it.
    #[error(
        "{name} is in IOMMU group {group} with another device of this guest, and the host's IOMMU cannot tell them apart; leave iommu and \
         platform.iommu_segments out for both, or give the guest one of them"
    )]
    NotApart {
        /// Its name.
        name: String,
        /// Number of its group.
        group: u32,
    },
    /// No such IOMMU.
    #[error("the host's kernel has no VFIO for this IOMMU (type 1, version 2); load the module vfio_iommu_type1")]
    NoType1,
    /// Interrupts are not checked.
    #[error(
        "the host's IOMMU does not check interrupts (no interrupt remapping), so the guest could use {name} to send the host any; switch \
         that on in the firmware, or accept it for all guests with the option allow_unsafe_interrupts=1 of the module {module}"
    )]
    UnsafeInterrupts {
        /// The device.
        name: String,
        /// Who has the option.
        module: &'static str,
    },
    /// No file of its own.
    #[error(
        "the host's kernel has no device file for {0} (/dev/vfio/devices): it is older than Linux 6.6, or built without VFIO_DEVICE_CDEV; \
         leave iommufd=on out"
    )]
    NoNode(String),
    /// No iommufd.
    #[error(
        "/dev/iommu cannot be opened; load the module iommufd, and let this user read and write it, or leave iommufd=on out"
    )]
    NoIommufd(#[source] io::Error),
    /// What was opened for it by somebody else is not what it takes.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// It is no PCI function.
    #[error("{0} is no PCI device; only those can be passed through")]
    NotPci(String),
    /// The kernel refuses something.
    #[error("cannot {what} of {name}")]
    Kernel {
        /// What was asked of it.
        what: &'static str,
        /// The device.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// Why a device cannot be had by descriptors. Each says what is to be done.
#[derive(Debug, Error)]
pub enum DescriptorError {
    /// It cannot be looked at.
    #[error("a descriptor cannot be looked at; give one that is open")]
    Unknown(#[source] io::Error),
    /// It has nothing to do with VFIO.
    #[error(
        "a descriptor is no device's; give that of its file in /dev/vfio/devices, or of its group in /dev/vfio, and with it that of \
         /dev/iommu, or /dev/vfio/vfio, if the VM has none yet"
    )]
    Strange,
    /// Its group has no IOMMU.
    #[error(
        "a descriptor is that of a group without an IOMMU behind it, VFIO's unsafe mode, in which a guest could write to any memory of \
         the host; switch the host's IOMMU on"
    )]
    NoIommu,
    /// It cannot be written to.
    #[error("a descriptor is not open for reading and writing; open it so (O_RDWR)")]
    ReadOnly,
    /// Nothing in sysfs.
    #[error("which device a descriptor is of cannot be seen at {}; let the VMM read /sys", .path.display())]
    Unseen {
        /// Where.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// None of a device.
    #[error(
        "there is no descriptor of a device; give that of its file in /dev/vfio/devices, or of its group in /dev/vfio"
    )]
    NoDevice,
    /// More than one of the same kind.
    #[error(
        "there are several descriptors of the same kind; a device has one, and one of /dev/iommu, or of /dev/vfio/vfio, is for all devices"
    )]
    Many,
    /// Something else instead of what is for all devices.
    #[error("the descriptor {option} is not {0}; open that, for reading and writing", option = for_all(.0))]
    NotForAll(Kind),
    /// None for all devices.
    #[error(
        "the VM has no {0}, which this device needs; send a descriptor of it with the device's, or give it at the start (--platform {flag}=N)",
        flag = for_all(.0)
    )]
    NoSpace(Kind),
    /// A second one for all devices.
    #[error("the VM has {0} already, which is for all its devices; give the device's descriptor alone")]
    Again(Kind),
    /// Another one for all devices.
    #[error("devices of this VM come by {0}; give descriptors for that")]
    OtherWay(Kind),
    /// What does not go together.
    #[error("devices of this VM come by {kind}, and a descriptor is for {needed}; {}", goes_with(.kind))]
    Mixed {
        /// What the device needs.
        needed: Kind,
        /// What there is.
        kind: Kind,
    },
    /// The group was given before.
    #[error("the VM has the IOMMU group {group} of {name} already; give the path of {name}, without a descriptor")]
    GroupAgain {
        /// The device.
        name: String,
        /// Its group.
        group: u32,
    },
    /// Not one device in a group.
    #[error("IOMMU group {group} has not one device for guests, but [{names}]; say which with path")]
    Several {
        /// The group.
        group: u32,
        /// Its devices.
        names: String,
    },
    /// The path is another device's.
    #[error("the path is that of {path}, and the descriptor is {is}; give those of one device, or leave path out")]
    Other {
        /// By its path.
        path: String,
        /// By its descriptor.
        is: String,
    },
    /// Mediated ones are opened anew for each guest.
    #[error("the mediated device {0} is opened for each guest anew, so it cannot come by a descriptor; give its path")]
    Mediated(String),
    /// A group cannot be apart from others that come by the same container.
    #[error(
        "{0} is to be behind the guest's IOMMU, for which it needs a container of its own, and a descriptor of a group comes with that of \
         all devices; give the descriptor of its own file, with iommufd, or its path"
    )]
    Apart(String),
    /// Somebody used it.
    #[error("the descriptor of {0} was used before; open it anew, and leave the rest to the VMM")]
    Used(String),
}

/// Which option of the platform's has it.
fn for_all(kind: &Kind) -> &'static str {
    match kind {
        Kind::Iommufd => "iommufd_fd",
        Kind::Container => "container_fd",
    }
}

/// What a device comes by there.
fn goes_with(kind: &Kind) -> &'static str {
    match kind {
        Kind::Iommufd => "give that of the device's own file in /dev/vfio/devices",
        Kind::Container => "give that of the device's group in /dev/vfio",
    }
}

/// What a person types to give a device to vfio-pci.
fn bind(name: &str, bound: bool) -> String {
    let device = format!("/sys/bus/pci/devices/{name}");
    let unbind = match bound {
        true => format!("echo {name} > {device}/driver/unbind; "),
        false => String::new(),
    };
    format!("echo vfio-pci > {device}/driver_override; {unbind}echo {name} > /sys/bus/pci/drivers_probe")
}
