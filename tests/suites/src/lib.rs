//! Tests that run a whole VMM.
