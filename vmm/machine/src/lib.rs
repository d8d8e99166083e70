//! Assembles a guest and runs it through its phases.
