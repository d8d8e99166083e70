//! A VM with nothing but memory and processors, and its saved state as JSON.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use kvm_ioctls::Kvm;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use triarch_arch::{
    CpuCount, CpuPlan, Elapsed, Platform, StateError, Vcpus, create_vcpus, layout, recreate_vcpus, restore_time,
    save_vcpu,
};
use triarch_device_core::{AccessError, Bus, BusDevice, NoSandbox, Sandbox};
use triarch_hypervisor::{Firmware, Vcpu, Vm};
use triarch_memory::{GuestMemory, RamOptions};
use triarch_vcpu::{Buses, VcpuEvent, VcpuSet};
use vm_memory::{Bytes, GuestAddress};

use crate::payload::guest::is_arm;

const MEMORY: u64 = 4 << 20;
/// Where the code is, and where it counts.
const CODE: u64 = 0x1000;
const COUNTER: u64 = 0x2000;

/// A port, and an address that is not RAM, where a device counts how often the guest reads from it.
const PORT: u16 = 0x500;
const DEVICE: u64 = 0x0100_0000;

/// That device.
#[derive(Default)]
pub(super) struct Reads(AtomicU32);

impl Reads {
    pub(super) fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

impl BusDevice for Reads {
    fn read(&self, _: u64, data: &mut [u8]) -> Result<(), AccessError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        data.fill(0);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), AccessError> {
        Ok(())
    }
}

/// What was saved of a VM, as the parts a snapshot has.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Saved {
    pub(super) plan: Value,
    pub(super) vcpus: Vec<Value>,
    pub(super) platform: Value,
    pub(super) firmware: Value,
}

/// A VM that does not run.
pub(super) struct Bed {
    vcpus: Vec<Vcpu>,
    parked: Vec<Vcpu>,
    firmware: Arc<dyn Firmware>,
    pub(super) plan: CpuPlan,
    platform: Platform,
    vm: Vm,
    pub(super) memory: GuestMemory,
}

/// One that does.
pub(super) struct Running {
    set: VcpuSet,
    _parked: Vec<Vcpu>,
    plan: CpuPlan,
    platform: Platform,
    vm: Vm,
    pub(super) memory: GuestMemory,
}

fn kvm() -> Result<Kvm> {
    Ok(triarch_hypervisor::open("make KVM available")?)
}

fn memory() -> Result<GuestMemory> {
    Ok(triarch_memory::allocate(
        &layout::ram_ranges(MEMORY),
        &RamOptions::default(),
    )?)
}

/// An address in RAM.
fn ram(offset: u64) -> Result<GuestAddress> {
    let first = layout::ram_ranges(MEMORY);
    Ok(GuestAddress(first.first().context("RAM")?.0.0 + offset))
}

/// What was written as JSON, read again.
fn parse<T: DeserializeOwned>(value: &Value) -> Result<T> {
    Ok(serde_json::from_str(&value.to_string())?)
}

impl Bed {
    /// A fresh VM that starts with `now` vCPUs of `max`.
    pub(super) fn new(now: u32, max: u32) -> Result<Self> {
        let kvm = kvm()?;
        let plan = CpuPlan::new(&kvm, CpuCount { boot: now, now, max }, None)?;
        let (vm, memory) = (Vm::new(&kvm)?, memory()?);
        vm.map_memory(&memory)?;
        let platform = Platform::new(&vm)?;
        let made = create_vcpus(&vm, &plan, &platform)?;
        Ok(Self::with(plan, vm, memory, platform, made))
    }

    fn with(plan: CpuPlan, vm: Vm, memory: GuestMemory, platform: Platform, made: Vcpus) -> Self {
        let Vcpus {
            running,
            parked,
            firmware,
            ..
        } = made;
        Self {
            vcpus: running,
            parked,
            firmware,
            plan,
            platform,
            vm,
            memory,
        }
    }

    /// A fresh VM with the state that was saved and the memory it had.
    pub(super) fn restore(saved: &Saved, content: &GuestMemory, elapsed: Elapsed) -> Result<Self> {
        let kvm = kvm()?;
        let plan = CpuPlan::restore(&kvm, &parse(&saved.plan)?)?;
        let (vm, memory) = (Vm::new(&kvm)?, memory()?);
        let mut bytes = vec![0; MEMORY as usize];
        content.read_slice(&mut bytes, ram(0)?)?;
        memory.write_slice(&bytes, ram(0)?)?;
        vm.map_memory(&memory)?;
        let platform = Platform::new(&vm)?;
        let states = saved.vcpus.iter().map(parse).collect::<Result<Vec<_>>>()?;
        let state = parse(&saved.platform)?;
        let made = recreate_vcpus(&vm, &plan, &platform, &states, &parse(&saved.firmware)?)?;
        platform.restore(&vm, &state)?;
        restore_time(&vm, &made.running, &states, &state, elapsed)?;
        Ok(Self::with(plan, vm, memory, platform, made))
    }

    pub(super) fn save(&self) -> Result<Saved> {
        let save = |vcpu| Ok(serde_json::to_value(save_vcpu(vcpu, &self.plan)?)?);
        Ok(Saved {
            plan: serde_json::to_value(self.plan.save())?,
            vcpus: self.vcpus.iter().map(save).collect::<Result<_>>()?,
            platform: serde_json::to_value(self.platform.save(&self.vm)?)?,
            firmware: serde_json::to_value(self.firmware.save())?,
        })
    }

    /// The vCPUs get threads, and the guest runs, with a device to read from.
    pub(super) fn run(self, device: &Arc<Reads>) -> Result<Running> {
        triarch_vcpu::install_kick_signal()?;
        let buses = Buses {
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
        };
        buses.pio.claim(PORT.into(), 1, device.clone())?;
        buses.mmio.claim(DEVICE, 4, device.clone())?;
        let sandbox: Arc<dyn Sandbox> = Arc::new(NoSandbox);
        let events = |index, event| {
            if event != VcpuEvent::Started {
                eprintln!("vCPU {index}: {event:?}");
            }
        };
        let set = VcpuSet::start(self.vcpus, buses, self.firmware, &sandbox, events)?;
        set.resume();
        Ok(Running {
            set,
            _parked: self.parked,
            plan: self.plan,
            platform: self.platform,
            vm: self.vm,
            memory: self.memory,
        })
    }
}

impl Running {
    /// Stops it and reads its state, each vCPU's on its own thread.
    pub(super) fn pause_and_save(&self) -> Result<Saved> {
        self.set.pause()?;
        let plan = self.plan.clone();
        let names = self.set.on_each(|index, _| {
            let thread = std::thread::current();
            (index, thread.name().unwrap_or_default().to_owned())
        })?;
        for (at, (index, name)) in names.iter().enumerate() {
            ensure!(at == *index && *name == format!("vcpu{index}"), "{names:?}");
        }
        let states = self.set.on_each(move |_, vcpu| save_vcpu(vcpu, &plan))?;
        let states = states.into_iter().collect::<Result<Vec<_>, StateError>>()?;
        Ok(Saved {
            plan: serde_json::to_value(self.plan.save())?,
            vcpus: states.iter().map(serde_json::to_value).collect::<Result<_, _>>()?,
            platform: serde_json::to_value(self.platform.save(&self.vm)?)?,
            firmware: serde_json::to_value(self.set.firmware().save())?,
        })
    }

    /// Nothing can be asked of vCPUs that run.
    pub(super) fn refuses_errands(&self) -> bool {
        self.set.on_each(|_, _| ()).is_err()
    }

    pub(super) fn resume(&self) {
        self.set.resume();
    }

    /// What the guest's code has counted.
    pub(super) fn counted(&self) -> Result<u32> {
        Ok(self.memory.read_obj(ram(COUNTER)?)?)
    }
}

/// Puts code into memory that reads from the device and counts, for ever, and the first vCPU at its start.
pub(super) fn count(saved: &mut Saved, memory: &GuestMemory) -> Result<()> {
    let first = saved.vcpus.first_mut().context("a vCPU")?;
    if is_arm() {
        // ldr w3, [x2]; ldr w0, [x1]; add w0, w0, #1; str w0, [x1]; b back
        let code = [0xb940_0043_u32, 0xb940_0020, 0x1100_0400, 0xb900_0020, 0x17ff_fffc];
        memory.write_slice(&code.map(u32::to_le_bytes).concat(), ram(CODE)?)?;
        // x1, x2 and pc, in words of 32 bits.
        for (number, value) in [(2, ram(COUNTER)?.0), (4, DEVICE), (64, ram(CODE)?.0)] {
            set_arm_register(first, 0x6030_0000_0010_0000 | number, &value.to_le_bytes())?;
        }
    } else {
        // Real mode: mov dx, PORT; in al, dx; inc dword [COUNTER]; jmp back to in
        let ([port, port_high], [low, high]) = (PORT.to_le_bytes(), (COUNTER as u16).to_le_bytes());
        let code = [0xba, port, port_high, 0xec, 0x66, 0xff, 0x06, low, high, 0xeb, 0xf8];
        memory.write_slice(&code, ram(CODE)?)?;
        for (register, value) in [("base", 0), ("selector", 0)] {
            first["special"]["cs"][register] = value.into();
        }
        first["general"]["rip"] = CODE.into();
    }
    Ok(())
}

/// Gives registers of every kind values that no fresh vCPU has.
pub(super) fn mark(saved: &mut Saved) -> Result<()> {
    let platform = &mut saved.platform;
    for (index, vcpu) in (1_u64..).zip(&mut saved.vcpus) {
        if is_arm() {
            for number in 0..31 {
                let value = (index << 32 | number).to_le_bytes();
                set_arm_register(vcpu, 0x6030_0000_0010_0000 + 2 * number, &value)?;
            }
            // TPIDR_EL0, VBAR_EL1
            for id in [0x6030_0000_0013_de82, 0x6030_0000_0013_c600] {
                set_arm_register(vcpu, id, &(index << 16).to_le_bytes())?;
            }
            continue;
        }
        for (number, name) in (1_u64..).zip(["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r15"]) {
            vcpu["general"][name] = (index << 32 | number).into();
        }
        vcpu["debug"]["addresses"] = json!([index, 2, 3, 4]);
        vcpu["events"]["nmi_masked"] = true.into();
        // KERNEL_GS_BASE, STAR, TSC_AUX or what there is of them, and the fourth variable MTRR.
        let msrs = vcpu["msrs"].as_array_mut().context("MSRs")?;
        for msr in msrs {
            if [0xc000_0102_u64, 0xc000_0081, 0x206].contains(&msr["index"].as_u64().unwrap_or(0)) {
                msr["value"] = (index << 12).into();
            }
        }
        // XMM0, and that it is there.
        let mut area = vcpu["xsave"].as_str().context("an area")?.to_owned();
        area.replace_range(2 * 160..2 * 176, &"5a".repeat(16));
        area.replace_range(2 * 512..2 * 513, "03");
        vcpu["xsave"] = area.into();
        // The local APIC's task priority, and by it the processor's; its spurious vector.
        vcpu["local_apic"][0x80 / 16] = 0x20.into();
        vcpu["local_apic"][0xa0 / 16] = 0x20.into();
        vcpu["special"]["cr8"] = 2.into();
        vcpu["local_apic"][0xf0 / 16] = 0x1ff.into();
    }
    if is_arm() {
        platform["distributor"]["priorities"][3] = 0x5068_7080.into();
        platform["distributor"]["enabled"][0] = 0x16.into();
        platform["distributor"]["pending"][1] = 0x4.into();
        platform["cpus"][1]["redistributor"]["priorities"][5] = 0x1018_2028.into();
        platform["cpus"][1]["interface"]["priority_mask"] = 0xf0.into();
        platform["cpus"][0]["interface"]["group_enabled"] = json!([0, 1]);
    } else {
        platform["pics"][1]["imr"] = 0x5a.into();
        platform["io_apic"]["redirections"][4] = 0x0100_0000_0001_0033_u64.into();
    }
    Ok(())
}

/// Changes a register in the saved state of an ARM vCPU.
fn set_arm_register(vcpu: &mut Value, id: u64, bytes: &[u8]) -> Result<()> {
    let registers = vcpu["registers"].as_array_mut().context("registers")?;
    let register = registers.iter_mut().find(|register| register["id"] == id);
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    register.context("a register")?["value"] = text.into();
    Ok(())
}
