//! Starts VMs, hosts and daemons for the tests.
