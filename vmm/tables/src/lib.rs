//! ACPI and SMBIOS tables.
