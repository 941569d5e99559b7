//! Guest memory as a space to be saved.

use std::io;

use clade_memory::{LayerHandle, PAGE_SHIFT, PAGE_SIZE, PageRange, RamError, RamImage};

use crate::content::PageContent;
use crate::space::{Space, linear};

/// An image, or its difference from another.
#[derive(Debug)]
pub(crate) struct RamSpace {
    bytes: u64,
    /// Ranges that layers have, ascending: each with the layer, and the layer's page at which the
    /// range starts.
    pieces: Vec<(PageRange, LayerHandle, u64)>,
    wanted: Vec<PageRange>,
}

impl RamSpace {
    /// The pages of `image`, or those that may have changed since `base`. Waits until the image is
    /// complete.
    pub(crate) fn new(image: &RamImage, base: Option<&RamImage>) -> Result<Self, RamError> {
        image.finish_background()?;
        let layout = image.layout();
        let wanted = match base {
            Some(base) => linear(layout, &image.changed_since(base)?),
            None => vec![PageRange::new(0, layout.bytes() >> PAGE_SHIFT)],
        };
        let mut pieces = Vec::new();
        let mut first = 0;
        for (map, (_, pages)) in image.maps().zip(layout.ranges()) {
            for (range, source) in map.iter() {
                let range = PageRange::new(first + range.start(), first + range.end());
                pieces.push((range, source.layer.clone(), source.at));
            }
            first += pages;
        }
        Ok(Self { bytes: layout.bytes(), pieces, wanted })
    }

    fn within(&self, range: PageRange) -> impl Iterator<Item = (PageRange, &LayerHandle, u64)> {
        let first = self.pieces.partition_point(|(piece, ..)| piece.end() <= range.start());
        let touching = self.pieces[first..].iter().take_while(move |(piece, ..)| piece.start() < range.end());
        touching.map(move |(piece, layer, at)| {
            let cut = piece.intersect(range);
            (cut, layer, at + (cut.start() - piece.start()))
        })
    }
}

impl Space for RamSpace {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>> {
        let mut runs = Vec::new();
        let mut push = |start, end, kind| {
            if start < end {
                runs.push((PageRange::new(start, end), kind));
            }
        };
        for wanted in &self.wanted {
            let mut done = wanted.start();
            for (range, layer, at) in self.within(*wanted) {
                let data = layer.data_runs(PageRange::with_len(at, range.len())).map_err(io::Error::other)?;
                for data in data {
                    let here = range.start() + (data.start() - at);
                    // Holes of the layer, and pages in no layer.
                    push(done, here, PageContent::Zero);
                    done = here + data.len();
                    push(here, done, PageContent::Data);
                }
            }
            push(done, wanted.end(), PageContent::Zero);
        }
        Ok(runs)
    }

    fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
        let wanted = PageRange::with_len(page, bytes.len() as u64 / PAGE_SIZE);
        let mut done = wanted.start();
        let slice = |from: u64, to: u64| ((from - page) << PAGE_SHIFT) as usize..((to - page) << PAGE_SHIFT) as usize;
        for (range, layer, at) in self.within(wanted) {
            bytes[slice(done, range.start())].fill(0);
            layer.read_pages(at, &mut bytes[slice(range.start(), range.end())]).map_err(io::Error::other)?;
            done = range.end();
        }
        bytes[slice(done, wanted.end())].fill(0);
        Ok(())
    }
}
