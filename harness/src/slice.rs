//! One vCPU's share of a bare guest's memory, and its expected words.

use clade_guests::abi::{Command, PAGE_SIZE, PAGE_WORDS, model};

use crate::bare::{BareError, BareVcpu};
use crate::machine::{GuestWords, Machine, WordsError};

/// Pages that one vCPU writes by [`Command::Write`], and their expected words. Operations are
/// counted from 0, and the words follow from their number.
#[derive(Clone, Debug)]
pub struct Slice {
    vcpu: u64,
    start: u64,
    pages: u64,
    hot: u64,
    window: u64,
    seed: u64,
    words: Vec<u64>,
    done: u64,
}

impl Slice {
    /// `pages` pages of zeros from `start` on. `vcpu` writes all of them, `window` at any moment.
    #[must_use]
    pub fn zeros(vcpu: u64, start: u64, pages: u64, window: u64, seed: u64) -> Self {
        let words = vec![0; (pages * PAGE_WORDS) as usize];
        Self { vcpu, start, pages, hot: pages, window, seed, words, done: 0 }
    }

    /// As [`Slice::zeros`], but filled by [`Slice::fill_command`]. `vcpu` then writes only the
    /// first `hot` pages.
    #[must_use]
    pub fn filled(vcpu: u64, start: u64, pages: u64, hot: u64, window: u64, seed: u64) -> Self {
        let mut slice = Self { hot: pages.min(hot), ..Self::zeros(vcpu, start, pages, window, seed) };
        model::fill(&mut slice.words, start, seed);
        slice
    }

    /// The index of the vCPU that writes it.
    #[must_use]
    pub fn vcpu(&self) -> u64 {
        self.vcpu
    }

    /// Its first guest-physical address.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its length in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The number of operations that produce the expected words.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// The command that fills all of it.
    #[must_use]
    pub fn fill_command(&self) -> Command {
        Command::Fill { start: self.start, pages: self.pages, seed: self.seed }
    }

    /// The command that writes it without end, from operation `first` on.
    #[must_use]
    pub fn write_command(&self, first: u64) -> Command {
        Command::Write { start: self.start, pages: self.hot, window: self.window, seed: self.seed, count: 0, first }
    }

    /// Advances to the words after `progress` operations, which never decrease.
    pub fn advance(&mut self, progress: u64) -> &[u64] {
        let hot = (self.hot * PAGE_WORDS) as usize;
        model::apply_writes(&mut self.words[..hot], self.seed, self.window, self.done..progress);
        self.done = progress;
        &self.words
    }

    /// Counts the bytes of `ram` that differ from the expected words, except in the first `except`
    /// pages.
    ///
    /// # Errors
    /// When the pages are not in `ram`.
    pub fn wrong_bytes(&self, ram: &(impl GuestWords + ?Sized), except: u64) -> Result<u64, WordsError> {
        let skip = (except * PAGE_WORDS) as usize;
        let mut buffer = vec![0u8; ram.chunk() * 8];
        let mut wrong = 0;
        let mut at = self.start + except * PAGE_SIZE;
        for want in self.words[skip..].chunks(ram.chunk()) {
            let got = &mut buffer[..want.len() * 8];
            ram.read(at, got)?;
            let got = got.as_chunks::<8>().0;
            let differ = |(got, want): (&[u8; 8], &u64)| {
                got.iter().zip(want.to_le_bytes()).filter(|(a, b)| **a != *b).count() as u64
            };
            if !got.iter().zip(want).all(|(got, want)| u64::from_le_bytes(*got) == *want) {
                wrong += got.iter().zip(want).map(differ).sum::<u64>();
            }
            at += want.len() as u64 * 8;
        }
        Ok(wrong)
    }
}

/// Makes the first `cpus` vCPUs of a running VM idle. Returns the operations that each had
/// completed.
///
/// # Errors
/// When the guest faults or does not answer.
pub fn stop_writing(vm: &(impl Machine + ?Sized), cpus: u64) -> Result<Vec<u64>, BareError> {
    let stop = |vcpu| {
        let vcpu = BareVcpu::new(vm, vcpu);
        vcpu.run(Command::Idle)?;
        vcpu.mailbox().progress()
    };
    (0..cpus).map(stop).collect()
}
