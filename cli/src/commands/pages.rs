//! `clade pages`: a VM's pages by kind, drawn on the terminal or as SVG.

mod paint;
mod svg;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clade_api::{CellInfo, Client, KindCounts, LayerInfo, MAX_CELLS, PagesAnswer};
use hyper::Method;

use crate::commands::remote::ask;
use crate::commands::units::show_size;
use crate::commands::{Failure, Outcome, print_json};

/// Cells of a line if the terminal's width is unknown.
const DEFAULT_WIDTH: u64 = 64;
/// Most lines of a drawing.
const MAX_LINES: u64 = 24;
/// Widest drawing.
const MAX_WIDTH: u64 = 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct PagesArgs {
    /// The VM's name.
    #[arg(value_name = "VM")]
    name: String,
    /// Write a drawing to a file, as SVG; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Cells of a line. Default: the terminal's width.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=MAX_WIDTH))]
    width: Option<u64>,
    /// Print JSON instead: every run of pages.
    #[arg(long, conflicts_with_all = ["svg", "width"])]
    json: bool,
}

/// The contents of a drawing.
struct Drawing<'a> {
    name: &'a str,
    answer: &'a PagesAnswer,
    width: u64,
}

/// The most frequent kind of a cell's pages, and its share of the VM's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shade {
    /// Some pages are pinned.
    Pinned,
    /// Half of the pages or more are the VM's own.
    Own,
    /// Some pages are the VM's own.
    SomeOwn,
    /// Most pages are of a layer, by its place in the list.
    Layer(usize),
    Reference,
    Absent,
}

impl Shade {
    fn of(cell: &CellInfo, layers: &[LayerInfo]) -> Self {
        let KindCounts { absent, reference, shared, exclusive, pinned } = cell.pages;
        if pinned > 0 {
            return Self::Pinned;
        }
        if exclusive > 0 {
            return if 2 * exclusive >= cell.pages.total() { Self::Own } else { Self::SomeOwn };
        }
        let place = || layers.iter().position(|layer| Some(layer.id) == cell.layer);
        match place().filter(|_| shared > 0) {
            Some(place) => Self::Layer(place),
            None if absent > reference => Self::Absent,
            None => Self::Reference,
        }
    }
}

impl Drawing<'_> {
    /// Returns the number of pages of a cell.
    fn grain(&self) -> u64 {
        self.answer.totals.total().div_ceil((self.answer.cells.len() as u64).max(1))
    }

    /// Returns the lines of the legend, each with its shade.
    fn legend(&self) -> Vec<(Shade, String)> {
        let KindCounts { absent, reference, exclusive, pinned, .. } = self.answer.totals;
        let pages = |what: &str, pages: u64| format!("{what}: {pages} pages, {}", show_size(pages << 12));
        let mut lines = vec![
            (Shade::Own, pages("the VM's own", exclusive)),
            (Shade::SomeOwn, "some of the cell is the VM's own".to_owned()),
            (Shade::Pinned, pages("its own, pinned for DMA", pinned)),
        ];
        for (place, layer) in self.answer.layers.iter().enumerate() {
            let shared = match layer.alone {
                Some(true) => ", of this VM alone",
                Some(false) | None => "",
            };
            // The rest are holes of its file: zeros that take no memory.
            let is_sparse = |kib: &u64| kib / 4 < layer.shown_pages;
            let memory =
                layer.resident_kib.filter(is_sparse).map(|kib| format!(", in {} of memory", show_size(kib << 10)));
            let of_layer = pages(&format!("of layer {}", layer.id), layer.shown_pages);
            let line = format!("{of_layer}{}{shared}", memory.unwrap_or_default());
            lines.push((Shade::Layer(place), line));
        }
        lines.push((Shade::Reference, pages("zeros or a pattern", reference)));
        lines.push((Shade::Absent, pages("not inherited", absent)));
        let totals = [exclusive, exclusive, pinned];
        let is_there = |(at, line): (usize, (Shade, String))| match line.0 {
            Shade::Own | Shade::SomeOwn | Shade::Pinned => (totals[at] > 0).then_some(line),
            Shade::Layer(place) => (self.answer.layers[place].shown_pages > 0).then_some(line),
            Shade::Reference => (reference > 0).then_some(line),
            Shade::Absent => (absent > 0).then_some(line),
        };
        lines.into_iter().enumerate().filter_map(is_there).collect()
    }

    fn title(&self) -> String {
        let total = self.answer.totals.total();
        format!("{}: {} in {total} pages, {} a cell", self.name, show_size(total << 12), self.grain())
    }
}

fn get(client: &Client, name: &str, query: &str) -> Result<PagesAnswer, Failure> {
    ask(client.request(Method::GET, name, &format!("/pages?{query}"), None::<&()>))
}

/// Reads all runs, in as many requests as needed. Pages may change between two of them.
fn all_runs(client: &Client, name: &str) -> Result<PagesAnswer, Failure> {
    let mut all = get(client, name, "max_runs=65536")?;
    while let Some(next) = all.next {
        let more = get(client, name, &format!("max_runs=65536&from={next}"))?;
        all.runs.extend(more.runs);
        all.next = more.next;
    }
    Ok(all)
}

pub(super) fn main(args: &PagesArgs) -> Outcome {
    let client = Client::default();
    if args.json {
        return print_json(&all_runs(&client, &args.name)?).map_err(Failure::run);
    }
    let terminal = || rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| u64::from(size.ws_col));
    let known = terminal().filter(|width| *width > 0 && io::stdout().is_terminal());
    let width = args.width.or(known).unwrap_or(DEFAULT_WIDTH).min(MAX_WIDTH);
    let cells = (width * MAX_LINES).min(MAX_CELLS);
    let answer = get(&client, &args.name, &format!("cells={cells}"))?;
    let drawing = Drawing { name: &args.name, answer: &answer, width };
    match &args.svg {
        Some(path) if path.as_os_str() == "-" => io::stdout().write_all(svg::draw(&drawing).as_bytes()),
        Some(path) => std::fs::write(path, svg::draw(&drawing))
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        None => {
            let is_coloured = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
            io::stdout().write_all(paint::draw(&drawing, is_coloured).as_bytes())
        }
    }
    .map_err(|error| if args.svg.is_some() { Failure::input(error) } else { Failure::run(error) })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A VM of two layers with pages of each kind, in eight cells.
    pub(super) fn answer() -> PagesAnswer {
        let cell = |first: u64, [absent, reference, shared, exclusive, pinned]: [u64; 5], layer: Option<u64>| {
            CellInfo { first, pages: KindCounts { absent, reference, shared, exclusive, pinned }, layer }
        };
        let layer = |id: u64, shown_pages| LayerInfo {
            id,
            file: format!("1:{id}"),
            home: clade_api::LayerHome::Memory,
            shown_pages,
            resident_kib: Some(4),
            alone: Some(id == 9),
        };
        PagesAnswer {
            totals: KindCounts { absent: 4, reference: 4, shared: 15, exclusive: 8, pinned: 1 },
            layers: vec![layer(4, 11), layer(9, 4)],
            runs: Vec::new(),
            next: None,
            cells: vec![
                cell(0, [0, 0, 4, 0, 0], Some(4)),
                cell(4, [0, 0, 4, 0, 0], Some(9)),
                cell(8, [0, 0, 0, 4, 0], None),
                cell(12, [0, 0, 3, 1, 0], Some(4)),
                cell(16, [0, 0, 3, 0, 1], Some(4)),
                cell(20, [0, 4, 0, 0, 0], None),
                cell(24, [4, 0, 0, 0, 0], None),
                cell(28, [0, 0, 1, 3, 0], Some(4)),
            ],
        }
    }

    #[test]
    fn a_cell_shows_what_matters_most_in_it() {
        let answer = answer();
        let shades: Vec<Shade> = answer.cells.iter().map(|cell| Shade::of(cell, &answer.layers)).collect();
        let expected = [
            Shade::Layer(0),
            Shade::Layer(1),
            Shade::Own,
            Shade::SomeOwn,
            Shade::Pinned,
            Shade::Reference,
            Shade::Absent,
            Shade::Own,
        ];
        assert_eq!(shades, expected);
    }
}
