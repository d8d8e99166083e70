//! CPU vendors, features and topology as data; no KVM inside.
