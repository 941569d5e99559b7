//! Children that ask whether they may run.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use clade_guests::abi::Command;
use clade_harness::{BareMailbox, GuestWords, WordsError};
use clade_memory::{GuestMemory, GuestRam};
use clade_test_support::wait_until;
use clade_tests::{Guest, Holdings};
use clade_vmm::vm::{Admission, ChildIdentity, ChildOptions, Vm, VmError};
use vm_memory::{Bytes, GuestAddress};

use super::{MIB, alone};

/// The memory of a VM that has not started.
struct Words(GuestMemory);

impl GuestWords for Words {
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), WordsError> {
        Ok(self.0.read_slice(bytes, GuestAddress(address))?)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), WordsError> {
        Ok(self.0.write_slice(bytes, GuestAddress(address))?)
    }

    fn store_and_ring(&self, address: u64, words: &[u64], _: u64) -> Result<(), WordsError> {
        self.store(address, words)
    }
}

/// A child waits for its admission with all of its state in place, and none of its vCPUs has run.
#[test]
fn a_child_runs_once_it_is_admitted_and_not_before() {
    for cpus in [1, 2] {
        let Some((_turn, context)) = alone() else { return };
        let parent = Guest::boot(&context, MIB, cpus);
        let (image, _) = parent.fork();
        // The first instructions of each vCPU take the command.
        let tell = |ram: &GuestRam| {
            (0..cpus).for_each(|vcpu| _ = BareMailbox::new(ram, vcpu).order(Command::Announce).unwrap());
        };
        let taken = |words: &Words| -> Vec<u64> {
            (0..cpus).map(|vcpu| BareMailbox::new(words, vcpu).taken().unwrap()).collect()
        };
        let child = |name: &str, answers: Receiver<bool>, asked: Sender<Words>| {
            let options = ChildOptions { paused: false, erase: &[], before_start: Some(&tell) };
            let ends = image.endpoints(name, &ChildIdentity::default()).unwrap();
            let answers = Arc::new(Mutex::new(answers));
            let admission = |vm: &Vm| -> Admission {
                let (asked, answers, memory) = (asked.clone(), Arc::clone(&answers), vm.ram().memory().clone());
                Arc::new(move || {
                    asked.send(Words(memory.clone())).unwrap();
                    answers.lock().unwrap().recv().unwrap()
                })
            };
            Vm::from_image_if(&context, name, &image, ends, options, Some(&admission))
        };
        let before = Holdings::count(context.store());
        for is_wanted in [false, true] {
            let (answer, answers) = channel();
            let (asked, asks) = channel();
            let (made, words, at_fork) = thread::scope(|scope| {
                let made = scope.spawn(|| child("child", answers, asked));
                let words = asks.recv().unwrap();
                let at_fork = taken(&words);
                // A vCPU that runs has taken its command by then.
                thread::sleep(Duration::from_millis(50));
                assert_eq!(taken(&words), at_fork);
                assert!(!made.is_finished());
                answer.send(is_wanted).unwrap();
                (made.join().unwrap(), words, at_fork)
            });
            match made {
                Ok(vm) => {
                    assert!(is_wanted);
                    let ran = || taken(&words).iter().zip(&at_fork).all(|(now, before)| now > before);
                    wait_until("each vCPU to take its command", ran);
                    assert_eq!(vm.stopped(), None);
                    // A running VM holds nothing of the question.
                    assert!(matches!(asks.try_recv(), Err(TryRecvError::Disconnected)));
                }
                Err(error) => {
                    assert!(matches!(error, VmError::Unwanted) && !is_wanted, "{error}");
                    assert_eq!(taken(&words), at_fork);
                }
            }
            drop(words);
            assert!(asks.recv().is_err(), "asked once");
            before.expect_same(context.store(), "a child that has gone");
        }
    }
}
