//! What differs between x86-64 and ARM64, behind the same names.
