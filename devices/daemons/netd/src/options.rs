//! Ports as they are described, on the command line and over the control socket.

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use triarch_api::MacAddress;
use triarch_api::flags::{FlagError, KeyValues};

use crate::switch::Rules;
use crate::switch::bucket::{Limit, Rate};
use crate::switch::guard::Guard;
use crate::switch::rules::{MAX_VLAN, Vlans, vlan};

/// Keys of `--port`.
pub(crate) const KEYS: &[&str] = &[
    "name",
    "socket",
    "mode",
    "tap",
    "interface",
    "num_queues",
    "mac",
    "vlan",
    "trunk",
    "native",
    "ip",
    "anti_spoof",
    "rate",
    "rate_burst",
    "pps",
    "pps_burst",
    "rx_rate",
    "rx_rate_burst",
    "rx_pps",
    "rx_pps_burst",
    "mtu",
    "max_macs",
];

/// Queues of a guest, receiving and sending ones together, at most.
pub const MAX_QUEUES: u16 = 256;
/// Queues where nothing is said.
const DEFAULT_QUEUES: u16 = 32;

/// Why a port is not possible as it was described.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// The flag cannot be understood.
    #[error(transparent)]
    Flag(#[from] FlagError),
    /// What it says makes no port.
    #[error("--port: {0}")]
    Wrong(String),
}

/// Which side of a vhost-user socket listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// This one.
    #[default]
    Server,
    /// The front end; here it is connected to, again and again.
    Client,
}

/// What can be changed while a port lives. What is missing stays as it is; a number that is 0 takes a limit away.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    /// The guest's hardware address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// The VLAN of an access port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// The VLANs of a trunk port, like `1+2+10-20`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trunk: Option<String>,
    /// The VLAN of frames without a tag on a trunk port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub native: Option<u16>,
    /// The guest's addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<Vec<IpAddr>>,
    /// Whether the guest may only send from its own addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub anti_spoof: Option<bool>,
    /// Bytes per second the guest may send.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Bytes it may send at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_burst: Option<u64>,
    /// Packets per second the guest may send.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pps: Option<u64>,
    /// Packets it may send at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pps_burst: Option<u64>,
    /// Bytes per second the guest is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate: Option<u64>,
    /// Bytes it is sent at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_burst: Option<u64>,
    /// Packets per second the guest is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_pps: Option<u64>,
    /// Packets it is sent at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_pps_burst: Option<u64>,
    /// The largest packet in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Addresses that are learnt at the port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_macs: Option<usize>,
}

fn limit(bytes: Option<u64>, burst: Option<u64>, packets: Option<u64>, packet_burst: Option<u64>) -> Limit {
    // A tenth of a second, and never less than one large segment or what a guest sends in one go.
    let rate = |per_second: Option<u64>, burst: Option<u64>, least: u64| {
        let per_second = per_second.filter(|rate| *rate > 0)?;
        let burst = burst.filter(|burst| *burst > 0).unwrap_or((per_second / 10).max(least));
        Some(Rate { per_second, burst })
    };
    Limit {
        bytes: rate(bytes, burst, 64 << 10),
        packets: rate(packets, packet_burst, 32),
    }
}

impl Settings {
    /// These, with what `change` says instead.
    pub fn with(self, change: Self) -> Self {
        // A port is of one kind or the other: what is said last counts.
        let (vlan, trunk, native) = match (&change.vlan, &change.trunk) {
            (Some(_), None) => (change.vlan, None, None),
            (None, Some(_)) => (None, change.trunk, change.native.or(self.native)),
            (Some(_), Some(_)) => (change.vlan, change.trunk, change.native),
            (None, None) => (self.vlan, self.trunk, change.native.or(self.native)),
        };
        Self {
            mac: change.mac.or(self.mac),
            vlan,
            trunk,
            native,
            ip: change.ip.or(self.ip),
            anti_spoof: change.anti_spoof.or(self.anti_spoof),
            rate: change.rate.or(self.rate),
            rate_burst: change.rate_burst.or(self.rate_burst),
            pps: change.pps.or(self.pps),
            pps_burst: change.pps_burst.or(self.pps_burst),
            rx_rate: change.rx_rate.or(self.rx_rate),
            rx_rate_burst: change.rx_rate_burst.or(self.rx_rate_burst),
            rx_pps: change.rx_pps.or(self.rx_pps),
            rx_pps_burst: change.rx_pps_burst.or(self.rx_pps_burst),
            mtu: change.mtu.or(self.mtu),
            max_macs: change.max_macs.or(self.max_macs),
        }
    }

    /// As the switch has them; or what is wrong with them, and what to write instead.
    pub fn rules(&self) -> Result<Rules, String> {
        let mac = self.mac.map(|mac| mac.0);
        if mac.is_some_and(|mac| mac[0] & 1 != 0 || mac == [0; 6]) {
            return Err("mac= is no address of one station; its first byte must be even".to_owned());
        }
        let in_range = |number: u16| vlan(&number.to_string());
        let vlans = match (self.vlan, &self.trunk, self.native) {
            (Some(_), Some(_), _) => return Err("vlan= and trunk= exclude each other; leave one out".to_owned()),
            (_, None, Some(_)) => return Err("native= is for trunk ports; use vlan=, or add trunk=".to_owned()),
            (vlan, None, None) => vlan
                .map(in_range)
                .transpose()?
                .map_or_else(Vlans::default, Vlans::Access),
            (None, Some(text), native) => Vlans::Trunk {
                tagged: text
                    .parse()
                    .map_err(|e| format!("trunk={text}: {e}; VLANs are 1 to {MAX_VLAN}"))?,
                native: native.map(in_range).transpose()?,
            },
        };
        let ips = self.ip.clone().unwrap_or_default();
        let guard = match (self.anti_spoof.unwrap_or(false), mac) {
            (false, _) => None,
            (true, Some(mac)) => Some(Guard { mac, ips }),
            (true, None) => return Err("anti_spoof=on needs the guest's address; add mac=".to_owned()),
        };
        if self.mtu.is_some_and(|mtu| mtu != 0 && mtu < 68) {
            return Err("mtu= is less than the 68 bytes that IPv4 needs".to_owned());
        }
        Ok(Rules {
            mac,
            vlans,
            guard,
            tx: limit(self.rate, self.rate_burst, self.pps, self.pps_burst),
            rx: limit(self.rx_rate, self.rx_rate_burst, self.rx_pps, self.rx_pps_burst),
            mtu: self.mtu.filter(|mtu| *mtu != 0),
            max_macs: self.max_macs.unwrap_or_else(|| Rules::default().max_macs),
        })
    }
}

/// One port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortOptions {
    /// What it is called.
    pub name: String,
    /// The vhost-user socket: a path, or `fd=N`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Who listens there.
    #[serde(default)]
    pub mode: Mode,
    /// A tap interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Another interface of the host, as a network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Queues of a guest at most, receiving and sending ones together; or queues of a tap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// What can be changed later.
    #[serde(flatten)]
    pub settings: Settings,
}

impl PortOptions {
    /// Looks at what belongs together.
    pub fn check(&self) -> Result<(), String> {
        let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if self.name.is_empty() || self.name.len() > 64 || !self.name.bytes().all(good) {
            let name = &self.name;
            return Err(format!(
                "the name '{name}' is not made of 1 to 64 letters, digits, '.', '_' and '-'"
            ));
        }
        let ends = [&self.socket, &self.tap, &self.interface];
        if ends.iter().filter(|end| end.is_some()).count() != 1 {
            return Err("a port has one of socket=, tap= and interface=".to_owned());
        }
        if self.mode == Mode::Client && self.socket.as_ref().is_none_or(|socket| socket.starts_with("fd=")) {
            return Err("mode=client is for the path of a socket; add socket=PATH".to_owned());
        }
        match (self.num_queues, &self.socket) {
            (None, _) => Ok(()),
            (Some(2..), None) if self.interface.is_some() => {
                Err("a port with interface= has one queue; leave num_queues= out".to_owned())
            }
            (Some(n @ 2..=MAX_QUEUES), Some(_)) if n.is_multiple_of(2) => Ok(()),
            (Some(1..=MAX_QUEUES), None) => Ok(()),
            (Some(n), Some(_)) => Err(format!(
                "num_queues={n} is not an even number from 2 to {MAX_QUEUES}; guests have queues in pairs"
            )),
            (Some(n), None) => Err(format!("num_queues={n} is not a number from 1 to {MAX_QUEUES}")),
        }
    }

    /// Pairs of queues a guest may have.
    pub fn pairs(&self) -> u16 {
        self.num_queues.unwrap_or(DEFAULT_QUEUES) / 2
    }
}

impl FromStr for PortOptions {
    type Err = OptionsError;

    /// Reads `name=NAME,socket=PATH` and so on.
    fn from_str(text: &str) -> Result<Self, OptionsError> {
        let kv = KeyValues::parse("--port", text, KEYS, &[])?;
        let string = |key| kv.text(key).map(str::to_owned);
        let wrong = OptionsError::Wrong;
        let mode = match kv.text("mode") {
            None | Some("server") => Mode::Server,
            Some("client") => Mode::Client,
            Some(other) => return Err(wrong(format!("mode={other} is neither server nor client"))),
        };
        let ip = match kv.text("ip") {
            None => None,
            Some(text) => {
                let all: Result<Vec<IpAddr>, _> = text.split('+').map(str::parse).collect();
                Some(all.map_err(|_| wrong(format!("ip={text} is no list of addresses; write A+B")))?)
            }
        };
        let options = Self {
            name: string("name").unwrap_or_default(),
            socket: string("socket"),
            mode,
            tap: string("tap"),
            interface: string("interface"),
            num_queues: kv.number("num_queues")?,
            settings: Settings {
                mac: kv.get("mac")?,
                vlan: kv.number("vlan")?,
                trunk: string("trunk"),
                native: kv.number("native")?,
                ip,
                anti_spoof: kv.switch("anti_spoof")?,
                rate: kv.size("rate")?,
                rate_burst: kv.size("rate_burst")?,
                pps: kv.number("pps")?,
                pps_burst: kv.number("pps_burst")?,
                rx_rate: kv.size("rx_rate")?,
                rx_rate_burst: kv.size("rx_rate_burst")?,
                rx_pps: kv.number("rx_pps")?,
                rx_pps_burst: kv.number("rx_pps_burst")?,
                mtu: kv.number("mtu")?,
                max_macs: kv.number("max_macs")?,
            },
        };
        options.check().map_err(wrong)?;
        options.settings.rules().map_err(wrong)?;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_read() {
        let text = "name=a-1,socket=/x/y,mode=client,num_queues=4,mac=52:54:00:00:00:01,trunk=1+10-12,native=3,\
                    ip=10.0.0.1+2001:db8::1,anti_spoof=on,rate=10M,rate_burst=1M,pps=1000,rx_rate=5M,mtu=1500,max_macs=4";
        let port: PortOptions = text.parse().expect("valid");
        assert_eq!((port.pairs(), port.mode), (2, Mode::Client));
        let rules = port.settings.rules().expect("valid");
        let guard = rules.guard.as_ref().expect("a guard");
        assert_eq!((guard.mac, guard.ips.len()), ([0x52, 0x54, 0, 0, 0, 1], 2));
        assert_eq!(
            (rules.vlans.classify(None), rules.vlans.classify(Some(11))),
            (Some(3), Some(11))
        );
        let tx = Limit {
            bytes: Some(Rate {
                per_second: 10 << 20,
                burst: 1 << 20,
            }),
            packets: Some(Rate {
                per_second: 1000,
                burst: 100,
            }),
        };
        assert_eq!(
            (rules.tx, rules.rx.packets, rules.mtu, rules.max_macs),
            (tx, None, Some(1500), 4)
        );
        let json = serde_json::to_string(&port).expect("JSON");
        assert_eq!(serde_json::from_str::<PortOptions>(&json).expect("the same"), port);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("socket=a", "the name ''"),
            ("name=a b,socket=a", "'a b'"),
            ("name=a", "one of socket=, tap= and interface="),
            ("name=a,socket=b,tap=c", "one of socket=, tap= and interface="),
            ("name=a,tap=b,interface=c", "one of socket=, tap= and interface="),
            ("name=a,interface=b,num_queues=2", "has one queue"),
            ("name=a,interface=b,mode=client", "mode=client"),
            ("name=a,tap=c,mode=client", "mode=client"),
            ("name=a,socket=b,num_queues=3", "even number"),
            ("name=a,socket=b,vlan=0", "'0' is no VLAN"),
            ("name=a,socket=b,vlan=4095", "'4095' is no VLAN"),
            ("name=a,socket=b,vlan=1,trunk=2", "exclude each other"),
            ("name=a,socket=b,trunk=2-1", "backwards"),
            ("name=a,socket=b,native=2", "trunk ports"),
            ("name=a,socket=b,anti_spoof=on", "add mac="),
            ("name=a,socket=b,mac=01:00:00:00:00:01", "must be even"),
            ("name=a,socket=b,ip=10.0.0", "no list of addresses"),
            ("name=a,socket=b,mtu=60", "68 bytes"),
            ("name=a,socket=b,colour=red", "no key 'colour'"),
        ] {
            let error = text.parse::<PortOptions>().expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn changes_leave_the_rest_alone() {
        let read = |text: &str| {
            format!("name=a,socket=b,{text}")
                .parse::<PortOptions>()
                .expect(text)
                .settings
        };
        let before = read("vlan=5,rate=1M,mtu=9000");
        let after = before.clone().with(Settings {
            trunk: Some("1-3".into()),
            rate: Some(0),
            ..Settings::default()
        });
        let rules = after.rules().expect("valid");
        assert_eq!(
            (rules.vlans.admits(2), rules.vlans.admits(5), rules.tx.bytes),
            (Some(true), None, None)
        );
        assert_eq!(rules.mtu, Some(9000));
        let back = after
            .with(Settings {
                vlan: Some(7),
                ..Settings::default()
            })
            .rules()
            .expect("valid");
        assert_eq!(back.vlans, Vlans::Access(7));
        let both = before.with(Settings {
            vlan: Some(1),
            trunk: Some("2".into()),
            ..Settings::default()
        });
        both.rules().expect_err("both");
    }
}
