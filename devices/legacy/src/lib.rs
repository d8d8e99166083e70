//! Serial port, RTC, reset and debug ports, ACPI registers.
