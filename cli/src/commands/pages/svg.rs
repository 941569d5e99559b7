//! A drawing as a file of its own.

use std::fmt::Write;

use super::{Drawing, Shade};

/// Side of a cell, in pixels.
const CELL: u64 = 9;
const MARGIN: u64 = 16;
const LINE: u64 = 20;
/// Least width, so that the legend fits.
const MIN_WIDTH: u64 = 480;
const OWN: &str = "#e8590c";
const PINNED: &str = "#c92a2a";
const REFERENCE: &str = "#e9ecef";

/// Returns the tone of a layer. The golden angle keeps neighbours apart, and off the colours of the
/// VM's own pages.
fn tone(place: usize) -> String {
    let hue = 150 + (place * 137) % 130;
    let light = 42 + (place % 3) * 9;
    format!("hsl({hue},45%,{light}%)")
}

fn colour(shade: Shade) -> String {
    match shade {
        Shade::Pinned => PINNED.to_owned(),
        Shade::Own | Shade::SomeOwn => OWN.to_owned(),
        Shade::Layer(place) => tone(place),
        Shade::Reference => REFERENCE.to_owned(),
        Shade::Absent => "none".to_owned(),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws the pages. The VM's own part of a cell covers the colour beneath in proportion.
pub(super) fn draw(drawing: &Drawing<'_>) -> String {
    let (layers, cells) = (&drawing.answer.layers, &drawing.answer.cells);
    let legend = drawing.legend();
    let columns = drawing.width.min(cells.len() as u64).max(1);
    let rows = (cells.len() as u64).div_ceil(columns);
    let top = 2 * MARGIN + LINE;
    let width = (columns * CELL).max(MIN_WIDTH) + 2 * MARGIN;
    let legend_top = top + rows * CELL + MARGIN;
    let height = legend_top + legend.len() as u64 * LINE + MARGIN;
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"{MARGIN}\" y=\"{}\" font-size=\"15\">{}</text>",
        MARGIN + LINE / 2,
        escaped(&drawing.title()),
    );
    for (at, cell) in (0u64..).zip(cells) {
        let (x, y) = (MARGIN + at % columns * CELL, top + at / columns * CELL);
        let shade = Shade::of(cell, layers);
        let beneath = match cell.layer.and_then(|id| layers.iter().position(|layer| layer.id == id)) {
            Some(place) => tone(place),
            None if shade == Shade::Absent => "none".to_owned(),
            None => REFERENCE.to_owned(),
        };
        let side = CELL - 1;
        let _ = write!(out, "<g><title>page {}: {:?}</title>", cell.first, Counted(cell));
        let _ = write!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"{beneath}\"/>");
        if matches!(shade, Shade::Pinned | Shade::Own | Shade::SomeOwn) {
            let own = (cell.pages.exclusive + cell.pages.pinned) as f64 / cell.pages.total().max(1) as f64;
            let opacity = own.max(0.3);
            let _ = write!(
                out,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" fill=\"{}\" \
                 fill-opacity=\"{opacity:.2}\"/>",
                colour(shade)
            );
        }
        out.push_str("</g>\n");
    }
    for (at, (shade, text)) in (0u64..).zip(&legend) {
        let y = legend_top + at * LINE;
        let opacity = if *shade == Shade::SomeOwn { 0.3 } else { 1.0 };
        let _ = writeln!(
            out,
            "<rect x=\"{MARGIN}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\" fill-opacity=\"{opacity}\" \
             stroke=\"#868e96\"/>\n<text x=\"{}\" y=\"{}\">{}</text>",
            colour(*shade),
            MARGIN + 20,
            y + 11,
            escaped(text),
        );
    }
    out.push_str("</svg>\n");
    out
}

/// Formats a cell's counts of pages.
struct Counted<'a>(&'a clade_api::CellInfo);

impl std::fmt::Debug for Counted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let pages = &self.0.pages;
        let kinds = [
            ("own", pages.exclusive),
            ("pinned", pages.pinned),
            ("shared", pages.shared),
            ("zeros", pages.reference),
            ("absent", pages.absent),
        ];
        let there: Vec<String> =
            kinds.iter().filter(|(_, count)| *count > 0).map(|(kind, count)| format!("{count} {kind}")).collect();
        f.write_str(&there.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::tests::answer;
    use super::*;

    #[test]
    fn a_file_has_all_cells_and_a_legend_within_its_bounds() {
        let answer = answer();
        let text = draw(&Drawing { name: "web", answer: &answer, width: 4 });
        assert!(text.starts_with("<svg xmlns=") && text.ends_with("</svg>\n"));
        assert_eq!(text.matches("<g>").count(), answer.cells.len());
        assert_eq!(text.matches("<g>").count(), text.matches("</g>").count());
        assert_eq!(text.matches("<text ").count(), text.matches("</text>").count());
        assert!(text.contains("of layer 4: 11 pages"), "{text}");
        assert!(text.contains("<title>page 12: 1 own, 3 shared</title>"), "{text}");
        let height: u64 = text.split("height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
        let last = text.rsplit("y=\"").next().unwrap().split('"').next().unwrap().parse::<u64>().unwrap();
        assert!(last < height, "{last} of {height}");
    }

    #[test]
    fn many_layers_have_distinct_tones() {
        let tones: BTreeSet<String> = (0..24).map(tone).collect();
        assert_eq!(tones.len(), 24);
    }
}
