//! CPU features by their Linux names, and sets of features to hide from a guest.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A CPUID output register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One CPUID bit. Several bits may share a name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Feature {
    pub(super) name: &'static str,
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) reg: Reg,
    pub(super) bit: u32,
}

/// The features of one CPUID register.
struct FeatureBits {
    leaf: u32,
    subleaf: u32,
    reg: Reg,
    bits: &'static [(&'static str, u32)],
}

const fn row(leaf: u32, subleaf: u32, reg: Reg, bits: &'static [(&'static str, u32)]) -> FeatureBits {
    FeatureBits { leaf, subleaf, reg, bits }
}

#[rustfmt::skip]
const ROWS: &[FeatureBits] = &[
    row(1, 0, Reg::Ecx, &[("pni", 0), ("pclmulqdq", 1), ("monitor", 3), ("vmx", 5), ("smx", 6), ("ssse3", 9), ("fma", 12), ("cx16", 13), ("pdcm", 15),
        ("pcid", 17), ("sse4_1", 19), ("sse4_2", 20), ("x2apic", 21), ("movbe", 22), ("popcnt", 23),
        ("tsc_deadline_timer", 24), ("aes", 25), ("xsave", 26), ("osxsave", 27), ("avx", 28), ("f16c", 29),
        ("rdrand", 30), ("hypervisor", 31)]),
    row(1, 0, Reg::Edx, &[("vme", 1), ("de", 2), ("pse", 3), ("tsc", 4), ("mce", 7), ("apic", 9), ("sep", 11),
        ("mtrr", 12), ("mca", 14), ("pat", 16), ("pse36", 17), ("clflush", 19), ("mmx", 23)]),
    row(6, 0, Reg::Eax, &[("arat", 2)]),
    row(7, 0, Reg::Ebx, &[("fsgsbase", 0), ("tsc_adjust", 1), ("bmi1", 3), ("hle", 4), ("avx2", 5), ("smep", 7),
        ("bmi2", 8), ("erms", 9), ("invpcid", 10), ("rtm", 11), ("mpx", 14), ("avx512f", 16), ("avx512dq", 17),
        ("rdseed", 18), ("adx", 19), ("smap", 20), ("avx512ifma", 21), ("clflushopt", 23), ("clwb", 24),
        ("avx512pf", 26), ("avx512er", 27), ("avx512cd", 28), ("sha_ni", 29), ("avx512bw", 30), ("avx512vl", 31)]),
    row(7, 0, Reg::Ecx, &[("avx512vbmi", 1), ("umip", 2), ("pku", 3), ("ospke", 4), ("waitpkg", 5),
        ("avx512_vbmi2", 6), ("user_shstk", 7), ("gfni", 8), ("vaes", 9), ("vpclmulqdq", 10), ("avx512_vnni", 11),
        ("avx512_bitalg", 12), ("avx512_vpopcntdq", 14), ("la57", 16), ("rdpid", 22), ("bus_lock_detect", 24),
        ("cldemote", 25), ("movdiri", 27), ("movdir64b", 28)]),
    row(7, 0, Reg::Edx, &[("avx512_4vnniw", 2), ("avx512_4fmaps", 3), ("fsrm", 4), ("avx512_vp2intersect", 8),
        ("md_clear", 10), ("serialize", 14), ("ibt", 20), ("amx_bf16", 22), ("avx512_fp16", 23), ("amx_tile", 24),
        ("amx_int8", 25), ("spec_ctrl", 26), ("intel_stibp", 27), ("flush_l1d", 28), ("arch_capabilities", 29),
        ("core_capabilities", 30), ("spec_ctrl_ssbd", 31)]),
    row(7, 1, Reg::Eax, &[("avx_vnni", 4), ("avx512_bf16", 5), ("fzrm", 10), ("fsrs", 11), ("fsrc", 12),
        ("amx_fp16", 21), ("avx_ifma", 23), ("lam", 26)]),
    row(7, 1, Reg::Edx, &[("avx_vnni_int8", 4), ("avx_ne_convert", 5), ("amx_complex", 8), ("avx_vnni_int16", 10),
        ("prefetchiti", 14), ("avx10", 19)]),
    row(0xd, 1, Reg::Eax, &[("xsaveopt", 0), ("xsavec", 1), ("xgetbv1", 2), ("xsaves", 3), ("xfd", 4)]),
    row(0x4000_0001, 0, Reg::Eax, &[("kvm_clock", 0), ("kvm_nopiodelay", 1), ("kvm_clock", 3), ("kvm_async_pf", 4),
        ("kvm_steal_time", 5), ("kvm_pv_eoi", 6), ("kvm_pv_unhalt", 7), ("kvm_pv_tlb_flush", 9),
        ("kvm_async_pf_vmexit", 10), ("kvm_pv_ipi", 11), ("kvm_poll_control", 12), ("kvm_pv_sched_yield", 13),
        ("kvm_async_pf_int", 14), ("kvm_msi_ext_dest_id", 15), ("kvm_hc_map_gpa_range", 16),
        ("kvm_migration_control", 17), ("kvm_clocksource_stable", 24)]),
    row(0x8000_0001, 0, Reg::Ecx, &[("lahf_lm", 0), ("cmp_legacy", 1), ("svm", 2), ("cr8_legacy", 4), ("abm", 5),
        ("sse4a", 6), ("misalignsse", 7), ("3dnowprefetch", 8), ("osvw", 9), ("xop", 11), ("fma4", 16), ("tbm", 21),
        ("topoext", 22), ("perfctr_core", 23), ("perfctr_nb", 24), ("perfctr_llc", 28)]),
    row(0x8000_0001, 0, Reg::Edx, &[("mmxext", 22), ("fxsr_opt", 25), ("pdpe1gb", 26), ("rdtscp", 27)]),
    row(0x8000_0007, 0, Reg::Edx, &[("constant_tsc", 8)]),
    row(0x8000_0008, 0, Reg::Ebx, &[("clzero", 0), ("xsaveerptr", 2), ("wbnoinvd", 9), ("ibpb", 12), ("ibrs", 14),
        ("stibp", 15), ("amd_ssbd", 24), ("virt_ssbd", 25)]),
    row(0x8000_0021, 0, Reg::Eax, &[("null_sel_clr_base", 6), ("autoibrs", 8)]),
    row(0x8000_0022, 0, Reg::Eax, &[("perfmon_v2", 0)]),
];

const AVX512F: &[&str] = &["avx512f"];

/// The features that `name` depends on: the kernel's own table, as far as hiding needs it.
fn needs(name: &str) -> &'static [&'static str] {
    match name {
        "xsaveopt" | "xsavec" | "xgetbv1" | "osxsave" | "avx" | "pku" | "mpx" | "amx_tile" => &["xsave"],
        "xsaves" => &["xsavec"],
        "xfd" => &["xsaves", "xgetbv1"],
        "avx2" | "fma" | "fma4" | "f16c" | "xop" | "vaes" | "vpclmulqdq" => &["avx"],
        "avx_vnni" | "avx_ifma" | "avx_vnni_int8" | "avx_vnni_int16" | "avx_ne_convert" | "avx512f" => &["avx2"],
        "ospke" => &["pku"],
        "amx_bf16" | "amx_int8" | "amx_fp16" | "amx_complex" => &["amx_tile"],
        "avx10" => AVX512F,
        "avx512_vbmi2" | "avx512_bitalg" => &["avx512vbmi"],
        "avx512_fp16" => &["avx512bw"],
        name if name.starts_with("avx512") => AVX512F,
        "kvm_async_pf_vmexit" | "kvm_async_pf_int" => &["kvm_async_pf"],
        "kvm_clocksource_stable" => &["kvm_clock"],
        _ => &[],
    }
}

/// Every feature bit with a name.
pub(super) fn features() -> impl Iterator<Item = Feature> {
    ROWS.iter().flat_map(|&FeatureBits { leaf, subleaf, reg, bits }| {
        bits.iter().map(move |&(name, bit)| Feature { name, leaf, subleaf, reg, bit })
    })
}

/// The name of an unknown CPU feature.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unknown CPU feature {name:?}{}", similar_text(similar))]
pub struct UnknownFeature {
    /// The name as given.
    pub name: String,
    /// Similar feature names, nearest first.
    pub similar: Vec<&'static str>,
}

fn similar_text(similar: &[&str]) -> String {
    if similar.is_empty() { String::new() } else { format!(": did you mean {}?", similar.join(", ")) }
}

/// Features to hide from a guest, with everything that depends on them.
///
/// Written as a comma-separated list of Linux names, as in `clearcpuid=`. A trailing `*` matches
/// any ending.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuHide(BTreeSet<&'static str>);

impl CpuHide {
    /// No features.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Nested virtualization, and shadow stacks. Hidden from every guest: no saved state includes a nested VM, or the
    /// shadow stack's pointer, which no MSR has.
    pub(super) fn unsaved() -> Self {
        Self(["vmx", "smx", "svm", "user_shstk"].into())
    }

    /// Features, and all that depend on them.
    pub(super) fn of(names: &[&'static str]) -> Self {
        Self(names.iter().copied().collect()).close()
    }

    /// Performance counters outside leaf 0xA.
    pub(super) fn counters() -> Self {
        Self(["pdcm", "perfctr_core", "perfctr_nb", "perfctr_llc", "perfmon_v2"].into())
    }

    /// The features that either set hides.
    #[must_use]
    pub(crate) fn union(&self, other: &Self) -> Self {
        Self(self.0.union(&other.0).copied().collect())
    }

    /// Whether `name` is hidden.
    #[must_use]
    pub(crate) fn hides(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    /// Adds the features that depend on hidden ones, transitively.
    fn close(mut self) -> Self {
        loop {
            let dependents: Vec<_> = features()
                .filter(|f| !self.0.contains(f.name) && needs(f.name).iter().any(|need| self.0.contains(need)))
                .map(|f| f.name)
                .collect();
            if dependents.is_empty() {
                return self;
            }
            self.0.extend(dependents);
        }
    }
}

impl FromStr for CpuHide {
    type Err = UnknownFeature;

    fn from_str(list: &str) -> Result<Self, UnknownFeature> {
        let mut names = BTreeSet::new();
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let matches = |name: &str| match word.strip_suffix('*') {
                Some(prefix) => !prefix.is_empty() && name.starts_with(prefix),
                None => name == word,
            };
            let before = names.len();
            let known = names.iter().any(|name: &&str| matches(name));
            names.extend(features().map(|f| f.name).filter(|name| matches(name)));
            if names.len() == before && !known {
                return Err(UnknownFeature { name: word.to_owned(), similar: similar(word) });
            }
        }
        Ok(Self(names).close())
    }
}

impl TryFrom<String> for CpuHide {
    type Error = UnknownFeature;

    fn try_from(list: String) -> Result<Self, UnknownFeature> {
        list.parse()
    }
}

impl From<CpuHide> for String {
    fn from(hide: CpuHide) -> Self {
        hide.to_string()
    }
}

impl fmt::Display for CpuHide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, name) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(name)?;
        }
        Ok(())
    }
}

/// Up to four names, nearest first: within two edits of `word`, or one contains the other.
fn similar(word: &str) -> Vec<&'static str> {
    let word = word.to_ascii_lowercase().replace(['-', '.'], "_");
    let mut found: Vec<_> = features()
        .filter_map(|f| {
            let distance = edit_distance(&word, f.name);
            let contains = word.len() >= 3 && (f.name.contains(&word) || word.contains(f.name) && f.name.len() >= 3);
            (distance <= 2.min(word.len() / 2) || contains).then_some((distance, f.name))
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found.into_iter().map(|(_, name)| name).take(4).collect()
}

/// The Levenshtein distance of `a` and `b` in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut current = vec![i + 1];
        for (j, y) in b.bytes().enumerate() {
            let replaced = previous[j] + usize::from(x != y);
            current.push(replaced.min(previous[j + 1] + 1).min(current[j] + 1));
        }
        previous = current;
    }
    previous.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_parse_and_print() {
        let hide: CpuHide = " popcnt, cx16,,smap".parse().unwrap();
        assert_eq!(hide.to_string(), "cx16,popcnt,smap");
        assert_eq!("".parse::<CpuHide>().unwrap(), CpuHide::none());
        let json = serde_json::to_string(&hide).unwrap();
        assert_eq!(json, "\"cx16,popcnt,smap\"");
        assert_eq!(serde_json::from_str::<CpuHide>(&json).unwrap(), hide);
    }

    #[test]
    fn hiding_xsave_hides_what_needs_it() {
        let hide: CpuHide = "xsave".parse().unwrap();
        for name in ["osxsave", "xsavec", "xsaves", "avx", "avx2", "fma", "avx512f", "avx512vl", "avx512_fp16", "pku"] {
            assert!(hide.hides(name), "{name}");
        }
        for name in ["sse4_2", "aes", "popcnt", "fsgsbase"] {
            assert!(!hide.hides(name), "{name}");
        }
    }

    #[test]
    fn what_is_hidden_by_default_has_names() {
        for always in [CpuHide::unsaved(), CpuHide::counters()] {
            assert_eq!(always.to_string().parse::<CpuHide>().unwrap(), always);
        }
        assert!("vmx,svm".parse::<CpuHide>().unwrap().hides("vmx"));
    }

    #[test]
    fn a_star_stands_for_any_ending() {
        let hide: CpuHide = "avx512*,avx512f".parse().unwrap();
        assert!(hide.hides("avx512_vnni") && hide.hides("avx512bw") && !hide.hides("avx2"));
        assert!("*".parse::<CpuHide>().is_err());
    }

    #[test]
    fn unknown_names_come_with_similar_ones() {
        let error = "popcnt,avx3".parse::<CpuHide>().unwrap_err();
        assert_eq!(error.to_string(), "unknown CPU feature \"avx3\": did you mean avx, avx2, adx, avx10?");
        let error = "SSE4.2".parse::<CpuHide>().unwrap_err();
        assert_eq!(error.similar[0], "sse4_2");
        let error = "zzzzzzzzz".parse::<CpuHide>().unwrap_err();
        assert_eq!(error.to_string(), "unknown CPU feature \"zzzzzzzzz\"");
    }

    #[test]
    fn the_table_is_consistent() {
        let names: BTreeSet<_> = features().map(|f| f.name).collect();
        let mut bits = BTreeSet::new();
        for f in features() {
            assert!(f.bit < 32, "{}", f.name);
            assert!(bits.insert((f.leaf, f.subleaf, f.reg as u8, f.bit)), "{} shares its bit", f.name);
            assert!(needs(f.name).iter().all(|need| names.contains(need)), "{} needs the unknown", f.name);
        }
    }
}
