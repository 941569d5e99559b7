//! The effects of commands on memory, computed by the host: tests replay them here and compare.
//!
//! `memory` is always the whole range that the command was given, as words.

use super::{GOLDEN, MIX_1, MIX_2, PAGE_SIZE, PAGE_WORDS, fill_word, touch_word, write_op};
use core::ops::Range;

/// `Command::Fill` on a range that starts at `start`.
pub fn fill(memory: &mut [u64], start: u64, seed: u64) {
    for (word, gpa) in memory.iter_mut().zip((start..).step_by(8)) {
        *word = fill_word(seed, gpa);
    }
}

/// Operations `ops` of `Command::Write`.
pub fn apply_writes(memory: &mut [u64], seed: u64, window: u64, ops: Range<u64>) {
    let pages = pages(memory);
    for i in ops {
        let op = write_op(seed, i, pages, window);
        memory[(op.page * PAGE_WORDS + op.slot) as usize] = op.value;
    }
}

/// The first `increments` of `Command::Count`.
pub fn apply_counts(memory: &mut [u64], stride: u64, increments: u64) {
    let stride = if stride == 0 { PAGE_WORDS } else { stride };
    let words = (memory.len() as u64).div_ceil(stride);
    for (word, n) in memory.iter_mut().step_by(stride as usize).zip(0..words) {
        *word = word.wrapping_add(increments / words + u64::from(n < increments % words));
    }
}

/// `Command::Touch` on a range that starts at `start`.
pub fn touch(memory: &mut [u64], start: u64, value: u64) {
    for (page, gpa) in memory.chunks_mut(PAGE_WORDS as usize).zip((start..).step_by(PAGE_SIZE as usize)) {
        page[0] = touch_word(value, gpa);
    }
}

/// Returns the sum that one pass of `Command::Read` finds.
pub fn read_sum(memory: &[u64], words: u64) -> u64 {
    let words = words.clamp(1, PAGE_WORDS) as usize;
    memory.chunks(PAGE_WORDS as usize).flat_map(|page| &page[..words]).fold(0, |sum: u64, word| sum.wrapping_add(*word))
}

/// Returns the operation of `Command::Write` that stored `value`: the inverse of `write_op`.
///
/// For a value that no operation stored, the answer is a number far beyond any count of operations.
pub const fn op_of(seed: u64, value: u64) -> u64 {
    unmix(value).wrapping_sub(seed).wrapping_mul(inverse(GOLDEN)).wrapping_sub(1)
}

const fn unmix(mut z: u64) -> u64 {
    z = unshift(z, 31).wrapping_mul(inverse(MIX_2));
    z = unshift(z, 27).wrapping_mul(inverse(MIX_1));
    unshift(z, 30)
}

/// The inverse of `z ^ (z >> bits)`, for `bits` above 64 / 3.
const fn unshift(z: u64, bits: u32) -> u64 {
    z ^ (z >> bits) ^ (z >> (2 * bits))
}

/// The inverse of an odd number modulo 2^64: each of Newton's steps doubles the correct bits, from
/// 3.
const fn inverse(odd: u64) -> u64 {
    let (mut x, mut bits) = (odd, 3);
    while bits < 64 {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        bits *= 2;
    }
    x
}

fn pages(memory: &[u64]) -> u64 {
    assert!(
        !memory.is_empty() && memory.len().is_multiple_of(PAGE_WORDS as usize),
        "{} words are not whole pages",
        memory.len()
    );
    memory.len() as u64 / PAGE_WORDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_tells_its_operation() {
        for i in [0, 1, 2, 1_000_000, u64::MAX - 1] {
            assert_eq!(op_of(77, write_op(77, i, 50, 3).value), i);
        }
        assert!(op_of(77, 0) > 1 << 48);
    }

    #[test]
    fn writes_can_be_applied_in_parts() {
        let (mut whole, mut parts) = (vec![0; 4096], vec![0; 4096]);
        apply_writes(&mut whole, 3, 2, 0..1000);
        apply_writes(&mut parts, 3, 2, 0..400);
        apply_writes(&mut parts, 3, 2, 400..1000);
        assert_eq!(whole, parts);
    }

    #[test]
    fn counts_go_round() {
        let mut memory = vec![0; 3 * PAGE_WORDS as usize];
        apply_counts(&mut memory, 0, 7);
        assert_eq!([memory[0], memory[512], memory[1024]], [3, 2, 2]);
        assert_eq!(memory.iter().sum::<u64>(), 7);
    }

    #[test]
    fn fill_and_touch_depend_on_the_address() {
        let mut memory = vec![0; 2 * PAGE_WORDS as usize];
        fill(&mut memory, 0x1000, 9);
        assert_eq!(memory[513], fill_word(9, 0x2008));
        touch(&mut memory, 0x1000, 1);
        assert_eq!([memory[0], memory[512]], [0x1001, 0x2001]);
        assert_eq!(memory[513], fill_word(9, 0x2008));
        assert_eq!(read_sum(&memory, 1), 0x3002);
    }
}
