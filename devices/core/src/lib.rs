//! Bus, interrupt and lifecycle traits every device is built on.
