//! What is counted, as Prometheus reads it (text format 0.0.4).

use std::fmt::Write;

use crate::plane::PortState;
use crate::registry::Described;
use crate::switch::{Counters, Drop};

/// The type of the text.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// All figures of all ports. Names of ports need no escapes.
pub(crate) fn render(ports: &[Described], macs: usize) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, lines: &[(String, u64)]| {
        // Writing to a string does not fail.
        let _ = write!(
            out,
            "# HELP triarch_netd_{name} {help}\n# TYPE triarch_netd_{name} {kind}\n"
        );
        for (labels, value) in lines {
            let _ = writeln!(out, "triarch_netd_{name}{labels} {value}");
        }
    };
    let each = |value: &dyn Fn(&Described) -> u64| -> Vec<(String, u64)> {
        let line = |port: &Described| (format!("{{port=\"{}\"}}", port.info.name), value(port));
        ports.iter().map(line).collect()
    };
    let both = |tx: fn(&Counters) -> u64, rx: fn(&Counters) -> u64| -> Vec<(String, u64)> {
        let lines = |port: &Described| {
            let (name, counters) = (&port.info.name, &port.info.counters);
            let line = |direction, value| (format!("{{port=\"{name}\",direction=\"{direction}\"}}"), value);
            [line("tx", tx(counters)), line("rx", rx(counters))]
        };
        ports.iter().flat_map(lines).collect()
    };
    let up = |port: &Described| u64::from(port.info.state != PortState::Down);
    family(
        "port_up",
        "gauge",
        "Whether there is somebody behind the port.",
        &each(&up),
    );
    let packets = both(|c| c.tx_packets, |c| c.rx_packets);
    let help = "Packets as on a wire that the port sent (tx) and received (rx).";
    family("port_packets_total", "counter", help, &packets);
    let bytes = both(|c| c.tx_bytes, |c| c.rx_bytes);
    let help = "Bytes of frames that the port sent (tx) and received (rx).";
    family("port_bytes_total", "counter", help, &bytes);
    let drops = |port: &Described| {
        let (name, counters) = (port.info.name.clone(), port.info.counters.clone());
        let line = move |reason: Drop| {
            let labels = format!("{{port=\"{name}\",reason=\"{}\"}}", reason.name());
            (labels, counters.drops(reason))
        };
        Drop::ALL.into_iter().map(line)
    };
    let drops: Vec<_> = ports.iter().flat_map(drops).collect();
    family(
        "port_drops_total",
        "counter",
        "Frames that were lost, by reason.",
        &drops,
    );
    let made = each(&|port| port.connections.0);
    family(
        "port_connections_total",
        "counter",
        "Front ends that were connected.",
        &made,
    );
    let broken = each(&|port| port.connections.1);
    let help = "Connections that ended for what the front end said or did not say.";
    family("port_broken_connections_total", "counter", help, &broken);
    let table = [(String::new(), macs as u64)];
    family("macs", "gauge", "Addresses in the forwarding table.", &table);
    out
}
