//! What is agreed on before anything else.

/// Feature bit VHOST_F_LOG_ALL: a back end can log which pages it writes ("Migration"), or is told to.
pub const LOG_ALL: u64 = 1 << 26;

/// Feature bit VHOST_USER_F_PROTOCOL_FEATURES: a back end has protocol features.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features (VHOST_USER_PROTOCOL_F_).
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// The log of written pages comes as a file.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// The network is told where a guest is now.
    pub const RARP: u64 = 1 << 2;
    /// Orders can be confirmed.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The front end says how large packets are (the text calls the bit MTU).
    pub const NET_MTU: u64 = 1 << 4;
    /// The back end has requests of its own.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The configuration space is the back end's.
    pub const CONFIG: u64 = 1 << 9;
    /// What is in flight is written down where a crash does not lose it.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// A device can be reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory comes and goes in parts.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// The back end hears of the driver's status.
    pub const STATUS: u64 = 1 << 16;
    /// The back end hands over what it knows of the device beside its rings, and takes it.
    pub const DEVICE_STATE: u64 = 1 << 19;
    /// What is of use to every device: front ends ask for it, and back ends offer it.
    pub const COMMON: u64 = MQ
        | LOG_SHMFD
        | REPLY_ACK
        | BACKEND_REQ
        | CONFIG
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}
