//! What a guest's kernel that panics shows of interrupts, on x86.
//!
//! A processor gives no maskable interrupt to a program that has cleared the interrupt flag (AMD64 Architecture Programmer's Manual, volume 2,
//! 8.1.3; Intel's, volume 3, 7.8.1), and where KVM has the local APIC a VMM cannot make it either. QEMU's emulated AMD processors do, once in
//! many thousand times: they give a guest of their guest again what KVM injected when it last entered it (docs/test-hosts.md). Mostly nobody
//! notices. If the guest's kernel was in that interrupt's handler and held a lock, it waits for itself for ever.

/// Bit of EFLAGS: maskable interrupts are given.
const IF: u64 = 1 << 9;
/// Entries of Linux for maskable interrupts, as a backtrace names them; those for exceptions begin with `asm_exc_`.
const ENTRIES: [&str; 2] = ["asm_sysvec_", "asm_common_interrupt"];
/// Lines from the entry on in which the interrupted program's registers begin: `RIP`, `Code`, `RSP`.
const REGISTERS: usize = 4;

/// The two lines of a backtrace which show that an interrupt came while none may: the entry's, and the one with the flags that it found.
pub fn given_while_masked(console: &str) -> Option<[&str; 2]> {
    let lines: Vec<&str> = console.lines().map(str::trim_end).collect();
    lines.iter().enumerate().find_map(|(n, entry)| {
        if !is_entry(words(entry)) {
            return None;
        }
        let frame = lines.get(n + 1..)?;
        // Else the kernel does not say what was interrupted.
        if !words(frame.first()?).starts_with("RIP: ") {
            return None;
        }
        let found = frame.iter().take(REGISTERS).find(|line| flags(line).is_some())?;
        (flags(found)? & IF == 0).then_some([*entry, *found])
    })
}

/// A function that was certainly called; what merely lies on the stack has a question mark.
fn is_entry(line: &str) -> bool {
    ENTRIES.iter().any(|entry| line.starts_with(entry))
}

/// A line without the time before it.
fn words(line: &str) -> &str {
    let rest = line.trim_start();
    let rest = rest.strip_prefix('[').and_then(|rest| Some(rest.split_once(']')?.1));
    rest.unwrap_or(line).trim_start()
}

fn flags(line: &str) -> Option<u64> {
    let text = line.split_once("EFLAGS: ")?.1.split_whitespace().next()?;
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a guest on an emulated AMD host that hung, without the lines that say nothing of this.
    const GIVEN_TWICE: &str = include_str!("../testdata/given_twice.txt");

    #[test]
    fn an_interrupt_in_its_own_handler_is_seen() {
        let [entry, flags] = given_while_masked(GIVEN_TWICE).unwrap();
        assert!(
            entry.ends_with("318.040963]  asm_sysvec_apic_timer_interrupt+0x1a/0x20"),
            "{entry}"
        );
        assert!(
            flags.ends_with("RSP: 0000:ffffc90000003f68 EFLAGS: 00010082"),
            "{flags}"
        );
        // As a serial line ends its lines, and without times.
        assert!(given_while_masked(&GIVEN_TWICE.replace('\n', "\r\n")).is_some());
        let words: Vec<_> = GIVEN_TWICE.lines().map(words).collect();
        assert!(given_while_masked(&words.join("\n")).is_some());
    }

    #[test]
    fn one_that_may_come_is_not() {
        // The NMI's own frame has the flag clear as well: it may come at any time.
        let may = GIVEN_TWICE.replace("EFLAGS: 00010082", "EFLAGS: 00010282");
        assert!(may.contains("EFLAGS: 00010002"));
        assert_eq!(given_while_masked(&may), None);
    }

    #[test]
    fn other_entries_are_not() {
        // An exception comes whether interrupts may or not.
        let exception = GIVEN_TWICE.replace("asm_sysvec_apic_timer_interrupt", "asm_exc_page_fault");
        assert_eq!(given_while_masked(&exception), None);
        // What lies on the stack from before is none that runs.
        let old = GIVEN_TWICE.replace("  asm_sysvec", "  ? asm_sysvec");
        assert_eq!(given_while_masked(&old), None);
    }

    #[test]
    fn half_a_backtrace_shows_nothing() {
        let lines: Vec<_> = GIVEN_TWICE.lines().collect();
        let flags = lines.iter().position(|line| line.contains("00010082")).unwrap();
        assert_eq!(given_while_masked(&lines[..flags].join("\n")), None);
        // Flags of another frame are not those of an entry without registers.
        let mut cut = lines.clone();
        cut.drain(flags - 1..=flags);
        assert_eq!(given_while_masked(&cut.join("\n")), None);
        assert_eq!(given_while_masked(""), None);
        assert_eq!(given_while_masked("asm_sysvec_x\nRIP: 1\nRSP: 2 EFLAGS: 0z"), None);
    }

    #[test]
    fn a_kernel_that_waits_for_itself_is_its_own_fault() {
        // It took an interrupt with the flag set in a lock's holder, which forgot to clear it.
        let bug = "[    1.0]  <IRQ>\n[    1.0]  _raw_spin_lock+0x1/0x2\n[    1.0]  asm_common_interrupt+0x26/0x40\n\
                   [    1.0] RIP: 0010:holder+0x1/0x2\n[    1.0] RSP: 0018:ffffc90000003f68 EFLAGS: 00000246\n";
        assert_eq!(given_while_masked(bug), None);
        assert!(given_while_masked(&bug.replace("00000246", "00000046")).is_some());
    }
}
