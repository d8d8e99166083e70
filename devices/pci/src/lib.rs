//! PCI configuration space, BARs, MSI-X, the host bridge and its buses.
