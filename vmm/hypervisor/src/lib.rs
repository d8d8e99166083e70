//! KVM: VM, vCPUs, interrupt routing, irqfd and ioeventfd.
