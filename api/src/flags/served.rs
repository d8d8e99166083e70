//! Flags of devices that daemons serve.

use super::{FlagError, KeyValues, set};
use crate::{FsConfig, GenericVhostUserConfig, VhostMode, served};

/// The daemon's socket of a disk or network interface: `vhost_socket=`, or Cloud Hypervisor's `socket=`.
pub(super) fn socket(kv: &KeyValues<'_>) -> Result<Option<std::path::PathBuf>, FlagError> {
    match (kv.text("vhost_socket"), kv.text("socket")) {
        (Some(_), Some(_)) => kv.refuse("vhost_socket and socket are the same; give one of them".to_owned()),
        (path, other) => Ok(path.or(other).map(Into::into)),
    }
}

/// `vhost_mode=client` or `vhost_mode=server`.
pub(super) fn mode(kv: &KeyValues<'_>) -> Result<VhostMode, FlagError> {
    match kv.text("vhost_mode") {
        None | Some("client" | "Client") => Ok(VhostMode::Client),
        Some("server" | "Server") => Ok(VhostMode::Server),
        Some(other) => kv.refuse(format!(
            "vhost_mode={other} is neither client nor server; write one of them"
        )),
    }
}

/// `--fs tag=TAG,socket=PATH,...`
pub fn fs(text: &str) -> Result<FsConfig, FlagError> {
    let known = [
        "tag",
        "socket",
        "num_queues",
        "queue_size",
        "on_disconnect",
        "datapath",
        "id",
    ];
    let kv = KeyValues::parse("--fs", text, &known, &["pci_segment", "pci_device_id"])?;
    let Some(tag) = kv.text("tag") else {
        return kv.refuse("it needs what the guest mounts it by; write tag=NAME".to_owned());
    };
    let Some(socket) = kv.text("socket") else {
        return kv.refuse("it needs the socket its daemon listens on; write socket=PATH".to_owned());
    };
    let mut config = FsConfig::new(tag, socket);
    set(&mut config.num_queues, kv.number("num_queues")?);
    set(&mut config.queue_size, kv.number("queue_size")?);
    set(&mut config.on_disconnect, kv.get("on_disconnect")?);
    set(&mut config.datapath, kv.get("datapath")?);
    config.id = kv.text("id").map(str::to_owned);
    Ok(config)
}

/// `--generic-vhost-user device_type=TYPE,socket=PATH,queue_sizes=[N,...]`
pub fn generic_vhost_user(text: &str) -> Result<GenericVhostUserConfig, FlagError> {
    let known = ["device_type", "virtio_id", "socket", "queue_sizes", "datapath", "id"];
    let kv = KeyValues::parse("--generic-vhost-user", text, &known, &["pci_segment", "pci_device_id"])?;
    let Some(kind) = kv.text("device_type").or(kv.text("virtio_id")) else {
        return kv
            .refuse("it needs the type of the device; write device_type=NUMBER, or a name such as sound".to_owned());
    };
    let device_type = served::device_type(kind).or_else(|problem| kv.refuse(format!("device_type={problem}")))?;
    let Some(socket) = kv.text("socket") else {
        return kv.refuse("it needs the socket its daemon listens on; write socket=PATH".to_owned());
    };
    let Some(sizes) = kv.list("queue_sizes")? else {
        return kv.refuse("it needs the descriptors of each queue; write queue_sizes=[64,64]".to_owned());
    };
    let numbers: Option<Vec<u16>> = sizes.iter().map(|size| size.parse().ok()).collect();
    let Some(queue_sizes) = numbers else {
        let given = sizes.join(",");
        return kv.refuse(format!(
            "queue_sizes=[{given}] are no numbers up to 32768; write queue_sizes=[64,64]"
        ));
    };
    Ok(GenericVhostUserConfig {
        device_type,
        socket: socket.into(),
        queue_sizes,
        datapath: kv.get("datapath")?.unwrap_or_default(),
        id: kv.text("id").map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{disk, net};

    #[test]
    fn flags_become_configuration() {
        let shared =
            fs("tag=shared,socket=/s,num_queues=2,queue_size=128,on_disconnect=error-after=5,id=f").expect("fs");
        assert_eq!(
            (shared.tag.as_str(), shared.num_queues, shared.queue_size),
            ("shared", 2, 128)
        );
        assert_eq!(fs("tag=t,socket=/s").expect("fs"), FsConfig::new("t", "/s"));
        let sound = generic_vhost_user("device_type=sound,socket=/s,queue_sizes=[64,32]").expect("a device");
        assert_eq!((sound.device_type, sound.queue_sizes), (25, vec![64, 32]));
        let old = generic_vhost_user("socket=\"/a,b\",virtio_id=26,queue_sizes=[512,512]").expect("a device");
        assert_eq!((old.device_type, old.socket), (26, "/a,b".into()));
        for key in ["socket", "vhost_socket"] {
            let served = net(&format!("vhost_user=on,{key}=/s,vhost_mode=client")).expect("net");
            assert!(served.vhost_user && served.vhost_socket == Some("/s".into()));
            let served = disk(&format!("vhost_user=on,{key}=/s")).expect("disk");
            assert_eq!(served.vhost_socket, Some("/s".into()));
        }
        assert_eq!(
            net("vhost_user=on,socket=/s,vhost_mode=server")
                .expect("net")
                .vhost_mode,
            VhostMode::Server
        );
    }

    #[test]
    fn nonsense_is_refused_with_the_fix() {
        let text = |error: FlagError| error.to_string();
        assert!(text(fs("socket=/s").expect_err("refused")).contains("write tag=NAME"));
        assert!(text(fs("tag=t").expect_err("refused")).contains("write socket=PATH"));
        let generic = |flag| text(generic_vhost_user(flag).expect_err("refused"));
        assert!(generic("socket=/s,queue_sizes=[1]").contains("device_type=NUMBER"));
        assert!(generic("device_type=fan,socket=/s,queue_sizes=[1]").contains("'fan' is no type"));
        assert!(generic("device_type=1,socket=/s").contains("queue_sizes=[64,64]"));
        assert!(generic("device_type=1,socket=/s,queue_sizes=[x]").contains("[x] are no numbers"));
        assert!(text(net("vhost_mode=both").expect_err("refused")).contains("neither client nor server"));
        assert!(text(net("socket=/a,vhost_socket=/b").expect_err("refused")).contains("give one of them"));
    }
}
