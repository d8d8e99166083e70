//! What is tried with random input: each function takes any bytes and panics when the code under test does something it must not.
//!
//! Unit tests call them with a fixed sequence of inputs, `cargo xtask fuzz` with those that libFuzzer finds.

use crate::server::fuzzing as server;
use crate::{
    CheckMigration, DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, ReceiveMigration,
    RemoveDevice, Resize, ResizeDisk, RestoreConfig, SendMigration, SetMigration, SnapshotConfig, VmConfig,
    VsockConfig, flags, read_object,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A stream of requests. The first byte tells how it is cut into pieces: whatever it is, the same requests come out, and neither bytes
/// nor descriptors pile up.
pub fn http(data: &[u8]) {
    let Some((cut, stream)) = data.split_first() else {
        return;
    };
    let whole = server::requests(stream, stream.len().max(1));
    let pieces = server::requests(stream, usize::from(*cut).max(1));
    assert_eq!(whole, pieces, "cut into pieces of {cut} bytes");
}

/// A body; the first byte tells of which type. What is understood is written and understood again, the same.
pub fn bodies(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else { return };
    match kind % 16 {
        0 => {
            if let Some(config) = body_of::<VmConfig>(body) {
                let _ = config.validate();
            }
        }
        1 => drop(body_of::<DiskConfig>(body)),
        2 => drop(body_of::<NetConfig>(body)),
        3 => drop(body_of::<VsockConfig>(body)),
        4 => drop(body_of::<Resize>(body)),
        5 => drop(body_of::<ResizeDisk>(body)),
        6 => drop(body_of::<FsConfig>(body)),
        7 => drop(body_of::<GenericVhostUserConfig>(body)),
        8 => drop(body_of::<SnapshotConfig>(body)),
        9 => drop(body_of::<RestoreConfig>(body)),
        10 => drop(body_of::<SendMigration>(body)),
        11 => drop(body_of::<ReceiveMigration>(body)),
        12 => drop(body_of::<SetMigration>(body)),
        13 => drop(body_of::<DeviceConfig>(body)),
        14 => drop(body_of::<CheckMigration>(body)),
        _ => drop(body_of::<RemoveDevice>(body)),
    }
}

fn body_of<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(body: &[u8]) -> Option<T> {
    let (read, ignored) = read_object::<T>(body).ok()?;
    let mut names = ignored.clone();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ignored.len(), "a field was named twice: {ignored:?}");
    let text = serde_json::to_vec(&read).expect("what was text can be written");
    let (again, ignored) = read_object::<T>(&text).expect("what was written can be read");
    assert!(ignored.is_empty(), "a field of our own was not known: {ignored:?}");
    assert_eq!(read, again);
    Some(read)
}

/// The value of a device's flag; the first byte tells of which.
pub fn flags(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else { return };
    let Ok(text) = str::from_utf8(text) else { return };
    let refused = match kind % 13 {
        0 => flags::cpus(text).err(),
        1 => flags::memory(text).err(),
        2 => flags::disk(text).err(),
        3 => flags::net(text).err(),
        4 => flags::rng(text).err(),
        5 => flags::vsock(text).err(),
        6 => flags::console("--serial", text).err(),
        7 => flags::debug_console(text).err(),
        8 => flags::fs(text).err(),
        9 => flags::generic_vhost_user(text).err(),
        10 => flags::platform(text).err(),
        11 => flags::device(text).err(),
        _ => flags::restore(text).err(),
    };
    if let Some(error) = refused {
        assert!(!error.to_string().is_empty());
    }
}

/// Inputs that get far, to start from.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let texts: &[&str] = match target {
        "http" => &[
            "\x01GET /api/v1/vm.info HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n",
            "\x07PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}GET / HTTP/1.0\r\n\r\n",
            "\x02PUT http://localhost/a?b=c HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ],
        "bodies" => &[
            "\0{\"cpus\":{\"boot_vcpus\":1,\"max_vcpus\":2},\"memory\":{\"size\":67108864},\"payload\":{\"kernel\":\"k\"},\"serial\":{\"mode\":\"Pty\"}}",
            "\x01{\"path\":\"/d\",\"image_type\":\"Raw\",\"num_queues\":1,\"queue_size\":128,\"vhost_user\":false,\"on_disconnect\":\"error-after=3\"}",
            "\x02{\"mac\":\"02:00:00:00:00:01\",\"ip\":\"10.0.0.1\",\"mask\":\"255.0.0.0\",\"mtu\":1500,\"fds\":[1]}",
            "\x03{\"cid\":3,\"socket\":\"s\"}",
            "\x04{\"desired_vcpus\":1,\"desired_ram\":1,\"desired_balloon\":null}",
            "\x05{\"id\":\"a\",\"desired_size\":512}",
            "\x06{\"id\":\"a\"}",
        ],
        _ => &[
            "\0boot=2,max=4,topology=1:4:1:1,max_phys_bits=46",
            "\x01size=1G,shared=on,hugepages=on,hugepage_size=2M",
            "\x02path=/d,readonly=on,num_queues=2,queue_size=256,serial=a,id=b",
            "\x03tap=tap0,mac=02:00:00:00:00:01,ip=10.0.0.1,mask=255.0.0.0,fd=[3,4]",
            "\x04src=/dev/urandom",
            "\x05cid=3,socket=s,id=v",
            "\x06socket=s",
            "\x07file=f",
            "\x08serial_number=a,uuid=b,oem_strings=[c,\"d,e\"]",
        ],
    };
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Always the same numbers (xorshift).
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, limit: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            usize::try_from(self.0 % limit.max(1) as u64).expect("small")
        }
    }

    /// Gives `target` its seeds, changed in a few places: bytes, pieces doubled, swapped and left out, ends cut off.
    fn mutate(name: &str, target: fn(&[u8]), rounds: usize) {
        let seeds = seeds(name);
        let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
        for round in 0..rounds {
            let mut input = seeds[round % seeds.len()].clone();
            for _ in 0..numbers.below(6) {
                let at = numbers.below(input.len());
                match numbers.below(5) {
                    0 => input[at] = numbers.below(256).try_into().expect("a byte"),
                    1 => drop(input.drain(at..(at + numbers.below(9)).min(input.len()))),
                    2 => {
                        let piece = input[at..].to_vec();
                        let to = numbers.below(input.len());
                        input.splice(to..to, piece);
                    }
                    3 => input[at] = b"{}[]\",:=\r\n\\0"[numbers.below(12)],
                    _ => input.truncate(at + 1),
                }
                if input.is_empty() {
                    input.push(0);
                }
            }
            target(&input);
        }
    }

    #[test]
    fn requests_survive_a_fixed_sequence() {
        mutate("http", http, 20_000);
    }

    #[test]
    fn bodies_survive_a_fixed_sequence() {
        mutate("bodies", bodies, 20_000);
    }

    #[test]
    fn flags_survive_a_fixed_sequence() {
        mutate("flags", flags, 20_000);
    }

    #[test]
    fn what_must_not_be_is_noticed() {
        let caught = std::panic::catch_unwind(|| mutate("flags", |data| assert!(data.len() < 60, "long"), 1000));
        assert!(caught.is_err());
    }
}
