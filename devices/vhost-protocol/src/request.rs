//! What is asked ("Front-end message types", "Back-end message types").

use crate::protocol;

macro_rules! requests {
    ($($name:ident = $number:literal,)*) => {
        /// Requests of a front end that are used, or understood.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        #[allow(missing_docs, non_camel_case_types, clippy::upper_case_acronyms)] // described in the protocol's text
        pub enum Request { $($name = $number,)* }

        impl Request {
            /// The request of this number.
            pub fn of(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            /// Its name in the protocol's text, without VHOST_USER_.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }
        }
    };
}

requests! {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    RESET_OWNER = 4,
    SET_MEM_TABLE = 5,
    SET_LOG_BASE = 6,
    SET_LOG_FD = 7,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    GET_VRING_BASE = 11,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    SET_VRING_ERR = 14,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    SEND_RARP = 19,
    NET_SET_MTU = 20,
    SET_BACKEND_REQ_FD = 21,
    GET_CONFIG = 24,
    SET_CONFIG = 25,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
    RESET_DEVICE = 34,
    GET_MAX_MEM_SLOTS = 36,
    ADD_MEM_REG = 37,
    REM_MEM_REG = 38,
    SET_STATUS = 39,
    GET_STATUS = 40,
    SET_DEVICE_STATE_FD = 42,
    CHECK_DEVICE_STATE = 43,
}

impl Request {
    /// Whether its answer has a payload of its own, so that none says whether it worked (REPLY_ACK).
    pub fn has_answer(self) -> bool {
        use Request::*;
        matches!(
            self,
            GET_FEATURES
                | GET_PROTOCOL_FEATURES
                | GET_QUEUE_NUM
                | GET_VRING_BASE
                | GET_CONFIG
                | GET_INFLIGHT_FD
                | GET_MAX_MEM_SLOTS
                | GET_STATUS
                | SET_LOG_BASE
                | SET_DEVICE_STATE_FD
                | CHECK_DEVICE_STATE
        )
    }

    /// The protocol feature that it belongs to; 0 if it may come without any.
    pub fn needs(self) -> u64 {
        use Request::*;
        match self {
            GET_QUEUE_NUM => protocol::MQ,
            SET_LOG_BASE | SET_LOG_FD => protocol::LOG_SHMFD,
            SET_BACKEND_REQ_FD => protocol::BACKEND_REQ,
            GET_CONFIG | SET_CONFIG => protocol::CONFIG,
            GET_INFLIGHT_FD | SET_INFLIGHT_FD => protocol::INFLIGHT_SHMFD,
            RESET_DEVICE => protocol::RESET_DEVICE,
            GET_MAX_MEM_SLOTS | ADD_MEM_REG | REM_MEM_REG => protocol::CONFIGURE_MEM_SLOTS,
            SET_STATUS | GET_STATUS => protocol::STATUS,
            SET_DEVICE_STATE_FD | CHECK_DEVICE_STATE => protocol::DEVICE_STATE,
            SEND_RARP => protocol::RARP,
            NET_SET_MTU => protocol::NET_MTU,
            _ => 0,
        }
    }
}

/// The back end's own request: its configuration space changed.
pub const BACKEND_CONFIG_CHANGE_MSG: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_belong_together() {
        let known: Vec<_> = (0..64).filter_map(Request::of).collect();
        assert_eq!(known.len(), 33);
        for request in known {
            assert_eq!(Request::of(request as u32), Some(request));
            assert_eq!(request.name(), format!("{request:?}"));
        }
        assert_eq!(Request::GET_STATUS as u32, 40);
        assert_eq!(Request::of(23), None);
    }
}
