//! Between KVM's structures and ours.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, kvm_debugregs, kvm_dtable, kvm_pic_state, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events,
};

use super::{
    DebugV1, DescriptorTableV1, EventsV1, ExceptionV1, GeneralV1, InterruptV1, PicV1, RunV1, SegmentV1, SmmV1,
    SpecialV1,
};

/// Two structures with the same names of fields.
macro_rules! same_fields {
    ($ours:ident, $theirs:ident, $($field:ident)*) => {
        impl From<&$theirs> for $ours {
            fn from(theirs: &$theirs) -> Self {
                Self { $($field: theirs.$field,)* }
            }
        }

        impl From<&$ours> for $theirs {
            fn from(ours: &$ours) -> Self {
                Self { $($field: ours.$field,)* }
            }
        }
    };
}

same_fields!(GeneralV1, kvm_regs, rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);

impl From<&kvm_segment> for SegmentV1 {
    fn from(theirs: &kvm_segment) -> Self {
        Self {
            base: theirs.base,
            limit: theirs.limit,
            selector: theirs.selector,
            kind: theirs.type_,
            present: theirs.present != 0,
            dpl: theirs.dpl,
            db: theirs.db != 0,
            s: theirs.s != 0,
            l: theirs.l != 0,
            g: theirs.g != 0,
            avl: theirs.avl != 0,
            unusable: theirs.unusable != 0,
        }
    }
}

impl From<&SegmentV1> for kvm_segment {
    fn from(ours: &SegmentV1) -> Self {
        Self {
            base: ours.base,
            limit: ours.limit,
            selector: ours.selector,
            type_: ours.kind,
            present: ours.present.into(),
            dpl: ours.dpl,
            db: ours.db.into(),
            s: ours.s.into(),
            l: ours.l.into(),
            g: ours.g.into(),
            avl: ours.avl.into(),
            unusable: ours.unusable.into(),
            padding: 0,
        }
    }
}

impl From<&kvm_dtable> for DescriptorTableV1 {
    fn from(theirs: &kvm_dtable) -> Self {
        Self {
            base: theirs.base,
            limit: theirs.limit,
        }
    }
}

impl From<&DescriptorTableV1> for kvm_dtable {
    fn from(ours: &DescriptorTableV1) -> Self {
        Self {
            base: ours.base,
            limit: ours.limit,
            padding: [0; 3],
        }
    }
}

macro_rules! special {
    ($(nested $nested:ident)* $(plain $plain:ident)*) => {
        impl From<&kvm_sregs> for SpecialV1 {
            fn from(theirs: &kvm_sregs) -> Self {
                Self { $($nested: (&theirs.$nested).into(),)* $($plain: theirs.$plain,)* }
            }
        }

        impl From<&SpecialV1> for kvm_sregs {
            /// The interrupt that KVM shows here is among the events as well.
            fn from(ours: &SpecialV1) -> Self {
                Self { $($nested: (&ours.$nested).into(),)* $($plain: ours.$plain,)* interrupt_bitmap: [0; 4] }
            }
        }
    };
}

special!(
    nested cs nested ds nested es nested fs nested gs nested ss nested tr nested ldt nested gdt nested idt
    plain cr0 plain cr2 plain cr3 plain cr4 plain cr8 plain efer plain apic_base
);

impl From<&kvm_debugregs> for DebugV1 {
    fn from(theirs: &kvm_debugregs) -> Self {
        Self {
            addresses: theirs.db,
            dr6: theirs.dr6,
            dr7: theirs.dr7,
        }
    }
}

impl From<&DebugV1> for kvm_debugregs {
    fn from(ours: &DebugV1) -> Self {
        Self {
            db: ours.addresses,
            dr6: ours.dr6,
            dr7: ours.dr7,
            ..Default::default()
        }
    }
}

const RUN: [(RunV1, u32); 5] = [
    (RunV1::Running, KVM_MP_STATE_RUNNABLE),
    (RunV1::Halted, KVM_MP_STATE_HALTED),
    (RunV1::Uninitialized, KVM_MP_STATE_UNINITIALIZED),
    (RunV1::InitReceived, KVM_MP_STATE_INIT_RECEIVED),
    (RunV1::SipiReceived, KVM_MP_STATE_SIPI_RECEIVED),
];

impl RunV1 {
    pub(super) fn from_kvm(number: u32) -> Option<Self> {
        RUN.iter().find(|(_, theirs)| *theirs == number).map(|(ours, _)| *ours)
    }

    pub(super) fn to_kvm(self) -> u32 {
        RUN.iter()
            .find(|(ours, _)| *ours == self)
            .map_or(KVM_MP_STATE_RUNNABLE, |(_, theirs)| *theirs)
    }
}

impl From<&kvm_vcpu_events> for EventsV1 {
    fn from(theirs: &kvm_vcpu_events) -> Self {
        let told = |flag| theirs.flags & flag != 0;
        let exception = theirs.exception;
        let interrupt = theirs.interrupt;
        Self {
            exception: (exception.injected != 0).then_some(ExceptionV1 {
                vector: exception.nr,
                error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            }),
            interrupt: (interrupt.injected != 0).then_some(InterruptV1 {
                vector: interrupt.nr,
                soft: interrupt.soft != 0,
            }),
            shadow: if told(KVM_VCPUEVENT_VALID_SHADOW) {
                interrupt.shadow
            } else {
                0
            },
            nmi_injected: theirs.nmi.injected != 0,
            nmi_pending: theirs.nmi.pending,
            nmi_masked: theirs.nmi.masked != 0,
            sipi_vector: told(KVM_VCPUEVENT_VALID_SIPI_VECTOR).then_some(theirs.sipi_vector),
            smm: told(KVM_VCPUEVENT_VALID_SMM).then_some(SmmV1 {
                active: theirs.smi.smm != 0,
                pending: theirs.smi.pending != 0,
                inside_nmi: theirs.smi.smm_inside_nmi != 0,
                latched_init: theirs.smi.latched_init != 0,
            }),
        }
    }
}

impl From<&EventsV1> for kvm_vcpu_events {
    fn from(ours: &EventsV1) -> Self {
        let mut theirs = Self {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        if let Some(exception) = &ours.exception {
            theirs.exception.injected = 1;
            theirs.exception.nr = exception.vector;
            theirs.exception.has_error_code = exception.error_code.is_some().into();
            theirs.exception.error_code = exception.error_code.unwrap_or(0);
        }
        if let Some(interrupt) = &ours.interrupt {
            theirs.interrupt.injected = 1;
            theirs.interrupt.nr = interrupt.vector;
            theirs.interrupt.soft = interrupt.soft.into();
        }
        theirs.interrupt.shadow = ours.shadow;
        theirs.nmi.injected = ours.nmi_injected.into();
        theirs.nmi.pending = ours.nmi_pending;
        theirs.nmi.masked = ours.nmi_masked.into();
        if let Some(vector) = ours.sipi_vector {
            theirs.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
            theirs.sipi_vector = vector;
        }
        // Where KVM has no such mode, it is told nothing of it unless the guest is in it.
        if let Some(smm) = ours.smm.filter(|smm| *smm != SmmV1::default()) {
            theirs.flags |= KVM_VCPUEVENT_VALID_SMM;
            theirs.smi.smm = smm.active.into();
            theirs.smi.pending = smm.pending.into();
            theirs.smi.smm_inside_nmi = smm.inside_nmi.into();
            theirs.smi.latched_init = smm.latched_init.into();
        }
        theirs
    }
}

macro_rules! pic {
    ($(byte $byte:ident $their_byte:ident)* $(flag $flag:ident $their_flag:ident)*) => {
        impl From<&kvm_pic_state> for PicV1 {
            fn from(theirs: &kvm_pic_state) -> Self {
                Self { $($byte: theirs.$their_byte,)* $($flag: theirs.$their_flag != 0,)* }
            }
        }

        impl From<&PicV1> for kvm_pic_state {
            fn from(ours: &PicV1) -> Self {
                Self { $($their_byte: ours.$byte,)* $($their_flag: ours.$flag.into(),)* }
            }
        }
    };
}

pic!(
    byte lines last_irr
    byte irr irr
    byte imr imr
    byte isr isr
    byte highest priority_add
    byte base irq_base
    byte init_step init_state
    byte elcr elcr
    byte elcr_mask elcr_mask
    flag reads_isr read_reg_select
    flag poll poll
    flag special_mask special_mask
    flag auto_eoi auto_eoi
    flag rotate_on_auto_eoi rotate_on_auto_eoi
    flag fully_nested special_fully_nested_mode
    flag init_has_fourth init4
);
