//! A drawing for a terminal: coloured cells, or letters.

use super::{Drawing, Shade};

/// Colours of layers (of 256): blues and greens, neighbours apart.
const LAYERS: [u8; 8] = [26, 71, 38, 61, 29, 74, 98, 108];
const RESET: &str = "\x1b[0m";

/// The letter of a shade. Layers beyond the last letter share it.
fn letter(shade: Shade) -> char {
    match shade {
        Shade::Pinned => 'P',
        Shade::Own => '#',
        Shade::SomeOwn => '+',
        Shade::Layer(place) => char::from(b'a' + place.min(25) as u8),
        Shade::Reference => '.',
        Shade::Absent => '-',
    }
}

/// The cell of a shade.
fn cell(shade: Shade, is_coloured: bool) -> String {
    let colour = match shade {
        _ if !is_coloured => return letter(shade).to_string(),
        Shade::Pinned => 196,
        Shade::Own => 208,
        Shade::SomeOwn => 222,
        Shade::Layer(place) => LAYERS[place % LAYERS.len()],
        Shade::Reference => 238,
        Shade::Absent => return " ".to_owned(),
    };
    format!("\x1b[48;5;{colour}m {RESET}")
}

/// The lines of cells, then the legend.
pub(super) fn draw(drawing: &Drawing<'_>, is_coloured: bool) -> String {
    let mut out = drawing.title() + "\n";
    for line in drawing.answer.cells.chunks(drawing.width as usize) {
        line.iter().for_each(|one| out += &cell(Shade::of(one, &drawing.answer.layers), is_coloured));
        out.push('\n');
    }
    for (shade, text) in drawing.legend() {
        out += &format!("{} {text}\n", cell(shade, is_coloured));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::answer;
    use super::*;

    #[test]
    fn letters_have_a_legend() {
        let answer = answer();
        let text = draw(&Drawing { name: "web", answer: &answer, width: 4 }, false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..3], ["web: 128K in 32 pages, 4 a cell", "ab#+", "P.-#"]);
        assert_eq!(lines[3], "# the VM's own: 8 pages, 32K");
        for used in ["+ ", "P its own, pinned for DMA: 1 pages", "a of layer 4: 11", ". zeros", "- not inherited: 4"] {
            assert!(lines.iter().any(|line| line.starts_with(used)), "{used}: {text}");
        }
        assert!(text.contains("b of layer 9: 4 pages, 16K, in 4K of memory, of this VM alone"), "{text}");
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn colours_tell_layers_apart_and_end_with_each_cell() {
        let answer = answer();
        let text = draw(&Drawing { name: "web", answer: &answer, width: 8 }, true);
        assert_ne!(cell(Shade::Layer(0), true), cell(Shade::Layer(1), true));
        assert_eq!(text.matches("\x1b[48;5;").count(), text.matches(RESET).count());
    }
}
