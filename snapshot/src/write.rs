//! Writing a layer: the caller's thread reads a window, finds zeros, computes checksums and
//! compresses, while another thread writes the window before.
//!
//! An uncompressed layer is written past the page cache, in writes of up to 4 MiB. A snapshot is
//! read later or never, and its pages would displace others.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{self, ScopedJoinHandle};

use clade_memory::{PAGE_SHIFT, PAGE_SIZE, PageRange};

use crate::content::PageContent;
use crate::error::Error;
use crate::files::FileOps;
use crate::format::{CHUNK_BYTES, CHUNK_PAGES, Chunk, Compression, Index, LayerEntry, Run, checksum, push_run};
use crate::layer::sealed_sum;
use crate::progress::Meter;
use crate::space::Space;

/// Pages in a window, which is read and written as a whole: 4 MiB.
const WINDOW: u64 = 1024;
/// Windows in flight.
const BUFFERS: usize = 3;
/// Zeros between data are written as data when they are fewer pages than this: fewer writes,
/// extents and mappings for a little space.
const SHORT: u64 = 16;
const ALIGN: usize = 4096;
static ZERO: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
/// The fastest regular level of zstd, because a save should be short.
const LEVEL: i32 = 1;

/// A window's bytes, aligned for direct writes.
#[derive(Debug)]
struct Buffer {
    raw: Vec<u8>,
    skip: usize,
}

impl Buffer {
    fn new() -> Self {
        let raw = vec![0; (WINDOW << PAGE_SHIFT) as usize + ALIGN];
        let skip = raw.as_ptr().align_offset(ALIGN);
        Self { raw, skip }
    }

    /// The bytes of the window's pages in `range`.
    fn pages(&mut self, range: PageRange) -> &mut [u8] {
        let from = self.skip + range.offset() as usize;
        &mut self.raw[from..from + range.bytes()]
    }
}

/// A job for the writer: pieces of a buffer, and their file offsets.
struct WriteJob {
    buffer: Buffer,
    /// Pages of the window, and their file offsets.
    pieces: Vec<(PageRange, u64)>,
    /// In place of pieces: compressed chunks, and their file offset.
    packed: Option<(Vec<u8>, u64)>,
}

/// Runs of pages, counted from the window's beginning.
type Pieces = Vec<Run>;

struct LayerWriter<'a> {
    name: &'a str,
    space: &'a dyn Space,
    index: Index,
    jobs: SyncSender<WriteJob>,
    buffers: Receiver<Buffer>,
    meter: &'a mut Meter<'a>,
}

/// Writes both files of a layer, for `runs` of a space, into `dir`, and syncs them.
pub(crate) fn write_layer(
    files: &FileOps,
    dir: &Path,
    name: &str,
    space: &dyn Space,
    (runs, compression): (&[Run], Compression),
    meter: &mut Meter<'_>,
) -> Result<LayerEntry, Error> {
    let packed = compression == Compression::Zstd;
    let path = dir.join(format!("{name}.data"));
    let file = files.create(&path, !packed)?;
    let pages = space.bytes().div_ceil(PAGE_SIZE);
    if !packed {
        files.set_len(&file, &path, pages << PAGE_SHIFT)?;
    }
    let index = Index { packed, bytes: space.bytes(), data_bytes: pages << PAGE_SHIFT, ..Index::default() };
    let index = fill(files, (&path, &file), (name, space), runs, index, meter)?;
    files.sync(&file, &path)?;
    let bytes = index.encode();
    files.write(&dir.join(format!("{name}.index")), &bytes)?;
    Ok(LayerEntry {
        compression,
        bytes: index.bytes,
        data_pages: index.count(PageContent::Data),
        zero_pages: index.count(PageContent::Zero),
        data_bytes: index.data_bytes,
        index_bytes: bytes.len() as u64,
        index_checksum: sealed_sum(&bytes),
    })
}

fn fill(
    files: &FileOps,
    (path, file): (&PathBuf, &File),
    (name, space): (&str, &dyn Space),
    runs: &[Run],
    index: Index,
    meter: &mut Meter<'_>,
) -> Result<Index, Error> {
    thread::scope(|scope| {
        let (jobs, todo) = sync_channel::<WriteJob>(BUFFERS);
        let (done, buffers) = channel();
        for _ in 0..BUFFERS {
            // Succeeds, because the receiver is in this function.
            let _ = done.send(Buffer::new());
        }
        let write = move || {
            for mut job in todo {
                for (pages, offset) in &job.pieces {
                    files.write_all_at(file, path, job.buffer.pages(*pages), *offset)?;
                }
                if let Some((bytes, offset)) = &job.packed {
                    files.write_all_at(file, path, bytes, *offset)?;
                }
                // The other side may have stopped, and then does not need the buffer.
                let _ = done.send(job.buffer);
            }
            Ok::<(), Error>(())
        };
        let writer = thread::Builder::new().spawn_scoped(scope, write);
        let writer = writer.map_err(|source| Error::file("written by a thread of its own", path, source))?;
        let mut meter = meter.part();
        let mut writing = LayerWriter { name, space, index, jobs, buffers, meter: &mut meter };
        let filled = writing.run(runs);
        let index = std::mem::take(&mut writing.index);
        // Closes the queue, so that the writer ends.
        drop(writing);
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // The writer's error comes first. The other side only knows that the writer has stopped.
        written?;
        filled?;
        Ok(index)
    })
}

impl LayerWriter<'_> {
    fn run(&mut self, runs: &[Run]) -> Result<(), Error> {
        let mut window = 0;
        let mut pieces = Pieces::new();
        for run in runs {
            let mut at = run.range.start();
            while at < run.range.end() {
                if at / WINDOW != window {
                    self.window(window * WINDOW, &mut pieces)?;
                    window = at / WINDOW;
                }
                let mut end = run.range.end().min((window + 1) * WINDOW);
                if run.kind == PageContent::Zero && at.is_multiple_of(WINDOW) && run.range.end() >= at + WINDOW {
                    // Any number of whole windows of zeros at once.
                    end = run.range.end() - run.range.end() % WINDOW;
                    push_run(&mut self.index.runs, PageRange::new(at, end), PageContent::Zero);
                } else {
                    let first = window * WINDOW;
                    pieces.push(Run { range: PageRange::new(at - first, end - first), kind: run.kind });
                }
                at = end;
            }
        }
        self.window(window * WINDOW, &mut pieces)?;
        if self.index.packed {
            self.index.data_bytes = self.index.chunks.last().map_or(0, |last| last.offset + u64::from(last.stored));
        }
        Ok(())
    }

    /// Reads the pages of the window from `first` on, and sends them to the writer. Empties
    /// `pieces`.
    fn window(&mut self, first: u64, pieces: &mut Pieces) -> Result<(), Error> {
        if !pieces.iter().any(|piece| piece.kind == PageContent::Data) {
            for piece in pieces.drain(..) {
                push_run(&mut self.index.runs, shifted(piece.range, first), piece.kind);
            }
            return Ok(());
        }
        // No buffer comes back when the writer has failed; the caller returns the writer's error.
        let Ok(mut buffer) = self.buffers.recv() else { return Err(Error::Cancelled) };
        let mut pages = 0;
        for piece in pieces.iter().filter(|piece| piece.kind == PageContent::Data) {
            let page = first + piece.range.start();
            let read = self.space.read_pages(page, buffer.pages(piece.range));
            read.map_err(|source| Error::Space { name: self.name.to_owned(), page, source })?;
            pages += piece.range.len();
        }
        let known = settle(pieces, &mut buffer);
        pieces.clear();
        let data: Vec<PageRange> =
            known.iter().filter(|run| run.kind == PageContent::Data).map(|run| run.range).collect();
        for run in known {
            push_run(&mut self.index.runs, shifted(run.range, first), run.kind);
        }
        let job = if self.index.packed { self.pack(first, &data, buffer) } else { self.place(first, &data, buffer) };
        if self.jobs.send(job).is_err() {
            return Err(Error::Cancelled);
        }
        self.meter.add(pages << PAGE_SHIFT)
    }

    /// Puts each page at its own offset.
    fn place(&mut self, first: u64, data: &[PageRange], mut buffer: Buffer) -> WriteJob {
        for number in chunks(data) {
            let mut hasher = twox_hash::XxHash3_64::new();
            let mut stored = 0;
            for part in within(data, number) {
                std::hash::Hasher::write(&mut hasher, buffer.pages(part));
                stored += part.bytes();
            }
            let number = first / CHUNK_PAGES + number;
            let sum = std::hash::Hasher::finish(&hasher);
            self.index.chunks.push(Chunk { number, offset: number * CHUNK_BYTES, stored: stored as u32, sum });
        }
        let pieces = data.iter().map(|range| (*range, shifted(*range, first).offset())).collect();
        WriteJob { buffer, pieces, packed: None }
    }

    /// Puts chunk behind chunk, each compressed if that makes it shorter.
    fn pack(&mut self, first: u64, data: &[PageRange], mut buffer: Buffer) -> WriteJob {
        let raw: Vec<(u64, Vec<u8>)> = chunks(data)
            .map(|number| {
                let mut bytes = Vec::with_capacity(CHUNK_BYTES as usize);
                within(data, number).for_each(|part| bytes.extend_from_slice(buffer.pages(part)));
                (number, bytes)
            })
            .collect();
        let threads = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let share = raw.len().div_ceil(threads).max(1);
        let compress = |bytes: &Vec<u8>| match zstd::bulk::compress(bytes, LEVEL) {
            Ok(small) if small.len() < bytes.len() => small,
            // Compression has failed, or has not made it shorter: it is stored as it is.
            _ => bytes.clone(),
        };
        let compress_all = |some: &[(u64, Vec<u8>)]| some.iter().map(|(_, bytes)| compress(bytes)).collect::<Vec<_>>();
        let packed: Vec<Vec<u8>> = thread::scope(|scope| {
            let begin = |some| {
                // On a host that gives no further thread, this one does the share.
                let worker = thread::Builder::new().spawn_scoped(scope, move || compress_all(some));
                worker.map_err(|_| compress_all(some))
            };
            let workers: Vec<_> = raw.chunks(share).map(begin).collect();
            let done = |worker: Result<ScopedJoinHandle<'_, _>, _>| match worker {
                Ok(worker) => worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                Err(done) => done,
            };
            workers.into_iter().flat_map(done).collect()
        });
        let start = self.index.chunks.last().map_or(0, |last| last.offset + u64::from(last.stored));
        let mut out = Vec::new();
        for ((number, _), bytes) in raw.iter().zip(&packed) {
            let offset = start + out.len() as u64;
            let (number, sum) = (first / CHUNK_PAGES + number, checksum(bytes));
            self.index.chunks.push(Chunk { number, offset, stored: bytes.len() as u32, sum });
            out.extend_from_slice(bytes);
        }
        WriteJob { buffer, pieces: Vec::new(), packed: Some((out, start)) }
    }
}

fn shifted(range: PageRange, by: u64) -> PageRange {
    PageRange::new(range.start() + by, range.end() + by)
}

/// The chunks of a window that have data.
fn chunks(data: &[PageRange]) -> impl Iterator<Item = u64> {
    (0..WINDOW / CHUNK_PAGES).filter(|number| within(data, *number).next().is_some())
}

fn within(data: &[PageRange], chunk: u64) -> impl Iterator<Item = PageRange> {
    let all = PageRange::with_len(chunk * CHUNK_PAGES, CHUNK_PAGES);
    data.iter().map(move |range| range.intersect(all)).filter(|range| !range.is_empty())
}

/// The kinds of a window's pages, after the presumed data pages were read.
fn settle(pieces: &[Run], buffer: &mut Buffer) -> Vec<Run> {
    let mut runs = Vec::new();
    for piece in pieces {
        for page in piece.range.start()..piece.range.end() {
            let one = PageRange::with_len(page, 1);
            let zero = piece.kind == PageContent::Zero || *buffer.pages(one) == ZERO;
            push_run(&mut runs, one, if zero { PageContent::Zero } else { PageContent::Data });
        }
    }
    let beside = |a: &Run, b: &Run| a.range.end() == b.range.start() && a.kind != b.kind;
    let mut out = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        let near = (at > 0 && beside(&runs[at - 1], run)) || runs.get(at + 1).is_some_and(|next| beside(run, next));
        if run.kind == PageContent::Zero && run.range.len() < SHORT && near {
            buffer.pages(run.range).fill(0);
            push_run(&mut out, run.range, PageContent::Data);
        } else {
            push_run(&mut out, run.range, run.kind);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Index;
    use crate::layer::LayerFile;
    use crate::progress::SaveProgress;
    use std::io;

    /// Many windows in which short zeros that are known, long ones, and pages that turn out to be
    /// zeros stand between data and gaps.
    struct Pattern;

    const PAGES: u64 = 9 * WINDOW + 5;

    /// Expected content of a page: its byte if it is data, `None` if it is not saved.
    fn byte(page: u64) -> Option<u8> {
        match (page / WINDOW, page % 100) {
            (4 | 5, _) | (_, 40..70) => Some(0),
            (7, _) | (_, 70..75) => None,
            (_, at) if at % 10 < 3 || at == 99 => Some(0),
            _ => Some((page % 251) as u8 + 1),
        }
    }

    impl Space for Pattern {
        fn bytes(&self) -> u64 {
            PAGES << PAGE_SHIFT
        }
        fn runs(&self) -> io::Result<Vec<(PageRange, PageContent)>> {
            let kind = |page: u64| match byte(page)? {
                // Detected only by reading.
                0 if page % 100 == 99 => Some(PageContent::Data),
                0 => Some(PageContent::Zero),
                _ => Some(PageContent::Data),
            };
            let mut runs = Vec::new();
            for page in 0..PAGES {
                kind(page).into_iter().for_each(|kind| push_run(&mut runs, PageRange::with_len(page, 1), kind));
            }
            Ok(runs.into_iter().map(|run| (run.range, run.kind)).collect())
        }
        fn read_pages(&self, page: u64, bytes: &mut [u8]) -> io::Result<()> {
            for (at, page_bytes) in bytes.chunks_mut(PAGE_SIZE as usize).enumerate() {
                page_bytes.fill(byte(page + at as u64).ok_or(io::ErrorKind::InvalidInput)?);
            }
            Ok(())
        }
    }

    #[test]
    fn each_page_is_stored_as_what_it_is() {
        let files = FileOps::default();
        for compression in [Compression::None, Compression::Zstd] {
            let dir = tempfile::tempdir().unwrap();
            let runs = crate::space::checked_runs("it", &Pattern, false).unwrap();
            let (watch, mut done) = (SaveProgress::none(), 0);
            let mut meter = Meter::new(&watch, &mut done, 0);
            let entry = write_layer(&files, dir.path(), "it", &Pattern, (&runs, compression), &mut meter).unwrap();
            let layer = LayerFile::open(&files, &files.dir(dir.path()).unwrap(), "it", &entry).unwrap();
            let mut found = vec![None; PAGES as usize];
            for run in layer.index.runs.iter().filter(|run| run.kind == PageContent::Zero) {
                run.range.blocks().for_each(|(_, part)| {
                    found[part.start() as usize..part.end() as usize].fill(Some(0));
                });
                let long = run.range.len() >= SHORT || run.range.start().is_multiple_of(WINDOW);
                let ends = |page: u64| page.is_multiple_of(WINDOW) || byte(page).is_none();
                assert!(long || ends(run.range.end()) || ends(run.range.start() - 1), "{run:?} is short");
            }
            for chunk in &layer.index.chunks {
                let bytes = layer.read_chunk(&files, chunk, Vec::new()).unwrap();
                let all = PageRange::with_len(chunk.number * CHUNK_PAGES, CHUNK_PAGES);
                let each = |range: PageRange, data: &[u8]| {
                    for (page, data) in (range.start()..range.end()).zip(data.chunks(PAGE_SIZE as usize)) {
                        assert!(data.iter().all(|byte| *byte == data[0]) && found[page as usize].is_none());
                        found[page as usize] = Some(data[0]);
                    }
                    Ok::<(), Error>(())
                };
                layer.pick(chunk, &bytes, all, each).unwrap();
            }
            let wrong = (0..PAGES).find(|page| found[*page as usize] != byte(*page));
            assert_eq!(wrong, None, "{compression:?}");
            let again = Index::decode(&std::fs::read(dir.path().join("it.index")).unwrap()).unwrap();
            assert_eq!(again, layer.index);
        }
    }
}
