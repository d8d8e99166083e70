//! Each device flag of the command line as configuration: the dialect that people write.

mod keyvalue;
mod restore;
mod served;
mod zones;

use std::path::PathBuf;

use thiserror::Error;

use crate::{
    BalloonConfig, ConsoleConfig, ConsoleMode, CpuTopology, CpusConfig, DebugConsoleConfig, DiskConfig, ImageType,
    MemoryConfig, NetConfig, PlatformConfig, RngConfig, VsockConfig,
};

pub use crate::passthrough::{device, handed_device};
pub use keyvalue::KeyValues;
pub use restore::{Restored, restore};
pub use served::{fs, generic_vhost_user};
pub use zones::{memory_zone, numa};

/// What is wrong with a flag's value, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{flag}: {problem}")]
pub struct FlagError {
    /// The flag, with its dashes.
    pub flag: &'static str,
    /// The problem.
    pub problem: String,
}

impl FlagError {
    fn new(flag: &'static str, problem: impl Into<String>) -> Self {
        let problem = problem.into();
        Self { flag, problem }
    }
}

/// Puts a parsed value, if there is one, in its field.
fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// `--cpus boot=2,max=4,topology=1:4:1:1`, or just a number.
pub fn cpus(text: &str) -> Result<CpusConfig, FlagError> {
    let only_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let text = if only_number {
        format!("boot={text}")
    } else {
        text.to_owned()
    };
    let known = ["boot", "max", "topology", "max_phys_bits"];
    let kv = KeyValues::parse(
        "--cpus",
        &text,
        &known,
        &["kvm_hyperv", "affinity", "features", "nested"],
    )?;
    let boot_vcpus = kv.number("boot")?.unwrap_or(1);
    let max_vcpus = kv.number("max")?.unwrap_or(boot_vcpus);
    let topology = kv.text("topology").map(topology).transpose()?;
    Ok(CpusConfig {
        boot_vcpus,
        max_vcpus,
        topology,
        max_phys_bits: kv.number("max_phys_bits")?,
    })
}

fn topology(text: &str) -> Result<CpuTopology, FlagError> {
    let levels: Result<Vec<u16>, _> = text.split(':').map(str::parse).collect();
    let Ok([threads_per_core, cores_per_die, dies_per_package, packages]) = levels.as_deref() else {
        let form = "threads per core:cores per die:dies per package:packages, like 2:4:1:1";
        return Err(FlagError::new(
            "--cpus",
            format!("topology={text} is invalid; write {form}"),
        ));
    };
    Ok(CpuTopology {
        threads_per_core: *threads_per_core,
        cores_per_die: *cores_per_die,
        dies_per_package: *dies_per_package,
        packages: *packages,
    })
}

/// `--memory size=1G,...`, or just a size.
pub fn memory(text: &str) -> Result<MemoryConfig, FlagError> {
    let mut config = MemoryConfig::default();
    if let Ok(size) = crate::parse_size(text) {
        return Ok(MemoryConfig { size, ..config });
    }
    let known = [
        "size",
        "shared",
        "hugepages",
        "hugepage_size",
        "prefault",
        "thp",
        "mergeable",
        "hotplug_size",
        "hotplug_method",
        "hotplugged_size",
    ];
    let elsewhere = ["reserve"];
    let kv = KeyValues::parse("--memory", text, &known, &elsewhere)?;
    set(&mut config.size, kv.size("size")?);
    set(&mut config.shared, kv.switch("shared")?);
    set(&mut config.hugepages, kv.switch("hugepages")?);
    config.hugepage_size = kv.size("hugepage_size")?;
    set(&mut config.prefault, kv.switch("prefault")?);
    set(&mut config.thp, kv.switch("thp")?);
    set(&mut config.mergeable, kv.switch("mergeable")?);
    config.hotplug_size = kv.size("hotplug_size")?;
    set(&mut config.hotplug_method, kv.get("hotplug_method")?);
    config.hotplugged_size = kv.size("hotplugged_size")?;
    Ok(config)
}

/// `--disk path=FILE,...`
pub fn disk(text: &str) -> Result<DiskConfig, FlagError> {
    let mut config = DiskConfig::default();
    let known = [
        "path",
        "readonly",
        "direct",
        "num_queues",
        "queue_size",
        "serial",
        "image_type",
        "io_uring",
        "backend",
        "vhost_user",
        "vhost_socket",
        "socket",
        "vhost_mode",
        "on_disconnect",
        "datapath",
        "iommu",
        "root_port",
        "guest_numa_id",
        "id",
    ];
    let elsewhere = ["pci_segment", "sparse", "lock_granularity", "backing_files"];
    let kv = KeyValues::parse("--disk", text, &known, &elsewhere)?;
    config.path = kv.text("path").map(PathBuf::from);
    set(&mut config.readonly, kv.switch("readonly")?);
    set(&mut config.direct, kv.switch("direct")?);
    set(&mut config.num_queues, kv.number("num_queues")?);
    set(&mut config.queue_size, kv.number("queue_size")?);
    config.serial = kv.text("serial").map(str::to_owned);
    config.disable_io_uring = kv.switch("io_uring")? == Some(false);
    set(&mut config.backend, kv.get("backend")?);
    set(&mut config.vhost_user, kv.switch("vhost_user")?);
    config.vhost_socket = served::socket(&kv)?;
    config.vhost_mode = served::mode(&kv)?;
    set(&mut config.on_disconnect, kv.get("on_disconnect")?);
    set(&mut config.datapath, kv.get("datapath")?);
    set(&mut config.iommu, kv.switch("iommu")?);
    set(&mut config.root_port, kv.switch("root_port")?);
    config.guest_numa_id = kv.number("guest_numa_id")?;
    config.id = kv.text("id").map(str::to_owned);
    match kv.text("image_type") {
        None | Some("raw" | "Raw") => config.image_type = ImageType::Raw,
        Some(other) => {
            return kv.refuse(format!(
                "image_type={other} is not supported by this version; convert the image to raw"
            ));
        }
    }
    Ok(config)
}

/// `--net tap=NAME,...`
pub fn net(text: &str) -> Result<NetConfig, FlagError> {
    let mut config = NetConfig::default();
    let known = [
        "tap",
        "ip",
        "mask",
        "mac",
        "host_mac",
        "mtu",
        "num_queues",
        "queue_size",
        "fd",
        "offload_tso",
        "offload_ufo",
        "offload_csum",
        "backend",
        "vhost_user",
        "vhost_socket",
        "socket",
        "vhost_mode",
        "on_disconnect",
        "datapath",
        "iommu",
        "guest_numa_id",
        "id",
    ];
    let kv = KeyValues::parse("--net", text, &known, &["pci_segment"])?;
    config.tap = kv.text("tap").map(str::to_owned);
    config.ip = kv.get("ip")?;
    config.mask = kv.get("mask")?;
    config.mac = kv.get("mac")?;
    config.host_mac = kv.get("host_mac")?;
    config.mtu = kv.number("mtu")?;
    if let Some(fds) = kv.list("fd")? {
        let numbers: Option<Vec<i32>> = fds.iter().map(|fd| fd.parse().ok()).collect();
        let Some(fds) = numbers else {
            let given = fds.join(",");
            return kv.refuse(format!(
                "fd=[{given}] are no descriptor numbers; write fd=3 or fd=[3,4]"
            ));
        };
        config.num_queues = 2 * fds.len().min(1 << 14) as u16;
        config.fds = Some(fds);
    }
    set(&mut config.num_queues, kv.number("num_queues")?);
    set(&mut config.queue_size, kv.number("queue_size")?);
    set(&mut config.offload_tso, kv.switch("offload_tso")?);
    set(&mut config.offload_ufo, kv.switch("offload_ufo")?);
    set(&mut config.offload_csum, kv.switch("offload_csum")?);
    set(&mut config.backend, kv.get("backend")?);
    set(&mut config.vhost_user, kv.switch("vhost_user")?);
    config.vhost_socket = served::socket(&kv)?;
    config.vhost_mode = served::mode(&kv)?;
    set(&mut config.on_disconnect, kv.get("on_disconnect")?);
    set(&mut config.datapath, kv.get("datapath")?);
    set(&mut config.iommu, kv.switch("iommu")?);
    config.guest_numa_id = kv.number("guest_numa_id")?;
    config.id = kv.text("id").map(str::to_owned);
    Ok(config)
}

/// `--rng src=FILE[,iommu=on]`
pub fn rng(text: &str) -> Result<RngConfig, FlagError> {
    let kv = KeyValues::parse("--rng", text, &["src", "iommu"], &[])?;
    let Some(src) = kv.text("src") else {
        return kv.refuse("it needs a source; write src=/dev/urandom".to_owned());
    };
    Ok(RngConfig {
        src: src.into(),
        iommu: kv.switch("iommu")?.unwrap_or(false),
    })
}

/// `--vsock cid=3,socket=PATH`
pub fn vsock(text: &str) -> Result<VsockConfig, FlagError> {
    let kv = KeyValues::parse("--vsock", text, &["cid", "socket", "iommu", "id"], &["pci_segment"])?;
    let Some(cid) = kv.number("cid")? else {
        return kv.refuse("it needs the guest's context id; write cid=3".to_owned());
    };
    let Some(socket) = kv.text("socket") else {
        return kv.refuse("it needs a path on the host; write socket=PATH".to_owned());
    };
    Ok(VsockConfig {
        cid,
        socket: socket.into(),
        iommu: kv.switch("iommu")?.unwrap_or(false),
        id: kv.text("id").map(str::to_owned),
    })
}

/// `--balloon size=SIZE,deflate_on_oom=on,free_page_reporting=on`
pub fn balloon(text: &str) -> Result<BalloonConfig, FlagError> {
    let known = ["size", "deflate_on_oom", "free_page_reporting", "id"];
    let kv = KeyValues::parse("--balloon", text, &known, &["statistics", "pci_segment"])?;
    Ok(BalloonConfig {
        size: kv.size("size")?.unwrap_or(0),
        deflate_on_oom: kv.switch("deflate_on_oom")?.unwrap_or(false),
        free_page_reporting: kv.switch("free_page_reporting")?.unwrap_or(false),
        id: kv.text("id").map(str::to_owned),
    })
}

/// `--serial tty|pty|null|off|file=PATH|socket=PATH`, and the same for `--console`.
pub fn console(flag: &'static str, text: &str) -> Result<ConsoleConfig, FlagError> {
    let mode = |mode| {
        Ok(ConsoleConfig {
            mode,
            file: None,
            socket: None,
        })
    };
    match text {
        "off" => mode(ConsoleMode::Off),
        "null" => mode(ConsoleMode::Null),
        "pty" => mode(ConsoleMode::Pty),
        "tty" => mode(ConsoleMode::Tty),
        _ => match text.split_once('=') {
            Some(("file", path)) => Ok(ConsoleConfig {
                mode: ConsoleMode::File,
                file: Some(path.into()),
                socket: None,
            }),
            Some(("socket", path)) => Ok(ConsoleConfig {
                mode: ConsoleMode::Socket,
                file: None,
                socket: Some(path.into()),
            }),
            _ => Err(FlagError::new(
                flag,
                format!("'{text}' is no console; write tty, pty, null, off, file=PATH or socket=PATH"),
            )),
        },
    }
}

/// `--debug-console tty|null|off|file=PATH`
pub fn debug_console(text: &str) -> Result<DebugConsoleConfig, FlagError> {
    let ConsoleConfig { mode, file, .. } = console("--debug-console", text)?;
    Ok(DebugConsoleConfig { mode, file })
}

/// `--platform uuid=...,serial_number=...,oem_strings=[...],dtb=on,iommufd=on,iommu_segments=[0]`
pub fn platform(text: &str) -> Result<PlatformConfig, FlagError> {
    let known = [
        "serial_number",
        "uuid",
        "oem_strings",
        "dtb",
        "iommufd",
        "iommufd_fd",
        "container_fd",
        "vfio_p2p_dma",
        "iommu",
        "iommu_segments",
    ];
    let elsewhere = ["num_pci_segments", "iommu_address_width", "tdx", "sev_snp"];
    let kv = KeyValues::parse("--platform", text, &known, &elsewhere)?;
    let strings = kv.list("oem_strings")?;
    let segments = kv.list("iommu_segments")?;
    let segments: Option<Option<Vec<u16>>> =
        segments.map(|list| list.into_iter().map(|segment| segment.parse().ok()).collect());
    if segments == Some(None) {
        return kv.refuse("iommu_segments are numbers of PCI segments; write iommu_segments=[0]".to_owned());
    }
    Ok(PlatformConfig {
        serial_number: kv.text("serial_number").map(str::to_owned),
        uuid: kv.text("uuid").map(str::to_owned),
        oem_strings: strings.map(|list| list.into_iter().map(str::to_owned).collect()),
        dtb: kv.switch("dtb")?.unwrap_or(false),
        iommufd: kv.switch("iommufd")?,
        iommufd_fd: kv.number("iommufd_fd")?,
        container_fd: kv.number("container_fd")?,
        vfio_p2p_dma: kv.switch("vfio_p2p_dma")?,
        iommu: kv.switch("iommu")?.unwrap_or(false),
        iommu_segments: segments.flatten(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_become_configuration() {
        let c = cpus("boot=2,max=4,topology=1:4:1:1").expect("cpus");
        assert_eq!(
            (c.boot_vcpus, c.max_vcpus, c.topology.map(|t| t.cores_per_die)),
            (2, 4, Some(4))
        );
        assert_eq!(cpus("boot=3").expect("cpus").max_vcpus, 3);
        assert_eq!(memory("1G").expect("memory").size, 1 << 30);
        assert!(memory("size=1G,shared=on").expect("memory").shared);
        let more = memory("size=1G,hotplug_method=virtio-mem,hotplug_size=8G").expect("memory");
        assert_eq!(
            (more.hotplug_size, more.hotplug_method),
            (Some(8 << 30), crate::HotplugMethod::VirtioMem)
        );
        assert!(memory("size=1G,hotplug_method=both").is_err());
        let n = net("fd=[5,6],mac=12:34:56:78:9a:bc").expect("net");
        assert_eq!((n.fds, n.num_queues), (Some(vec![5, 6]), 4));
        let served = disk("vhost_user=on,vhost_socket=s,on_disconnect=error-after=30").expect("disk");
        assert_eq!(served.on_disconnect, crate::OnDisconnect::ErrorAfter(30));
        assert!(served.vhost_user && served.vhost_socket == Some("s".into()));
        let b = balloon("size=64M,free_page_reporting=on,id=b").expect("balloon");
        assert_eq!(
            (b.size, b.free_page_reporting, b.deflate_on_oom),
            (64 << 20, true, false)
        );
        assert!(disk("path=x,io_uring=off").expect("disk").disable_io_uring);
        assert!(disk("path=x,iommu=on").expect("disk").iommu && net("iommu=on").expect("net").iommu);
        assert!(vsock("cid=3,socket=s,iommu=on").expect("vsock").iommu && rng("src=/r,iommu=on").expect("rng").iommu);
        let all = platform("iommu_segments=[0]").expect("platform");
        assert_eq!(all.iommu_segments, Some(vec![0]));
        assert_eq!(console("--serial", "file=/x").expect("file").mode, ConsoleMode::File);
    }

    #[test]
    fn nonsense_is_refused_with_the_fix() {
        let text = |error: FlagError| error.to_string();
        assert!(text(cpus("topology=4").expect_err("refused")).contains("like 2:4:1:1"));
        assert!(text(cpus("boot=-1").expect_err("refused")).contains("--cpus: boot=-1"));
        assert!(text(cpus("99999999999").expect_err("refused")).contains("boot=99999999999 is too large"));
        assert!(text(net("fd=[3,x]").expect_err("refused")).contains("fd=[3,x] are no descriptor numbers"));
        assert!(text(console("--serial", "ttyS0").expect_err("refused")).contains("file=PATH"));
        assert!(text(vsock("cid=3").expect_err("refused")).contains("socket=PATH"));
        assert!(text(platform("iommu_segments=[x]").expect_err("refused")).contains("iommu_segments=[0]"));
        assert!(text(net("mac=1").expect_err("refused")).contains("six hexadecimal bytes"));
        let direct = disk("vhost_user=on,vhost_socket=s,datapath=direct").expect("disk");
        assert_eq!(direct.datapath, crate::DataPath::Direct);
        let server = disk("vhost_user=on,vhost_socket=s,vhost_mode=server").expect("disk");
        assert_eq!(server.vhost_mode, crate::VhostMode::Server);
        assert!(text(disk("datapath=fast").expect_err("refused")).contains("auto, direct or relay"));
        assert!(text(disk("on_disconnect=wait").expect_err("refused")).contains("error-after=SECONDS"));
        assert!(text(disk("path=x,image_type=qcow2").expect_err("refused")).contains("raw"));
    }
}
