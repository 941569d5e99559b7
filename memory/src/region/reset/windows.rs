//! Layers of a region that resets read through a mapping.
//!
//! A page of a mapped layer is read without a system call, and without a page fault from its second reset
//! on. Mapping a layer costs two system calls, a mapping of the host's limit, and a fault (2 us) for each block
//! that is touched first. So a layer is mapped when a second reset in a row reads it.
//!
//! A window keeps its layer's file from being freed. So windows are closed with the view that they were
//! opened for.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::MappingBudget;
use crate::budget::Promise;
use crate::layer::{Layer, LayerId};
use crate::lost::LostMemory;
use crate::sys::FileWindow;

/// Most layers of a region that are mapped or remembered.
const MAX_LAYERS: usize = 8;

/// A layer that a reset has read.
#[derive(Debug)]
struct ReadLayer {
    id: LayerId,
    /// With the promise of its mapping.
    window: Option<(FileWindow, Promise)>,
}

/// The layers that resets have read since the view was published.
#[derive(Debug, Default)]
pub(crate) struct LayerWindows(Vec<ReadLayer>);

impl LayerWindows {
    /// Returns the window of a layer, if it is open.
    pub(super) fn get(&self, layer: LayerId) -> Option<&FileWindow> {
        let read = self.0.iter().find(|read| read.id == layer)?;
        read.window.as_ref().map(|(window, _)| window)
    }

    /// Notes that a reset reads `layer`. Opens its window if an earlier one has, unless more than half of the host's
    /// mappings are promised: freezes and forks need them, and can be refused. Without a window, pages are read by system
    /// calls.
    pub(super) fn note(&mut self, layer: &Layer, budget: &MappingBudget, failure: &Arc<LostMemory>) {
        let Some(read) = self.0.iter_mut().find(|read| read.id == layer.id()) else {
            if self.0.len() < MAX_LAYERS {
                self.0.push(ReadLayer { id: layer.id(), window: None });
            }
            return;
        };
        if read.window.is_none()
            && budget.left() > budget.limit() / 2
            && let Ok(promise) = budget.promise(1)
        {
            match FileWindow::open(layer.as_fd(), layer.pages(), failure) {
                Ok(window) => read.window = Some((window, promise)),
                Err(error) => tracing::debug!(%error, layer = ?layer.id(), "a layer is not mapped for resets"),
            }
        }
    }

    /// The number of open windows.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().filter(|read| read.window.is_some()).count()
    }
}
