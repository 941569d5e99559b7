//! Forms with files (`multipart/form-data`), parsed as they arrive.

use thiserror::Error;

/// Maximum length of a part's headers.
const MAX_HEADERS: usize = 8 << 10;
/// Maximum length of a boundary in characters.
const MAX_BOUNDARY: usize = 70;

/// Why a form cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MultipartError {
    /// The headers of a part have no end.
    #[error("the headers of a part are longer than {MAX_HEADERS} bytes")]
    LongHeaders,
    /// A boundary is followed by something other than the end of the line or of the form.
    #[error("a boundary is followed by something else than a line's end")]
    Boundary,
    /// The form ends before its last boundary.
    #[error("the form has no end")]
    Truncated,
}

/// The next event of a form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartEvent {
    /// A part begins.
    Part {
        /// The field's name.
        name: Option<String>,
        /// The file's name, with its path if there is one.
        filename: Option<String>,
    },
    /// Bytes of the part.
    Data(Vec<u8>),
    /// The part's end.
    PartEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Preamble,
    Boundary,
    Headers,
    Data,
    End,
}

/// Parses a form. Buffers one chunk, and the headers of one part.
#[derive(Debug)]
pub struct Multipart {
    delimiter: Vec<u8>,
    buffer: Vec<u8>,
    state: State,
}

impl Multipart {
    /// A form whose parts are separated by `boundary`.
    #[must_use]
    pub fn new(boundary: &str) -> Self {
        // The first boundary needs no line before it.
        Self { delimiter: format!("\r\n--{boundary}").into_bytes(), buffer: b"\r\n".to_vec(), state: State::Preamble }
    }

    /// Adds received bytes. All events must be taken out before the next call.
    pub fn push(&mut self, chunk: &[u8]) {
        if self.state != State::End {
            self.buffer.extend_from_slice(chunk);
        }
    }

    fn find_delimiter(&self) -> Option<usize> {
        memchr::memmem::find(&self.buffer, &self.delimiter)
    }

    /// Length without the tail, which may be the beginning of a delimiter.
    fn without_tail(&self) -> usize {
        self.buffer.len().saturating_sub(self.delimiter.len() - 1)
    }

    /// The next event; `None` if more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are not a valid form.
    pub fn next_event(&mut self) -> Result<Option<PartEvent>, MultipartError> {
        loop {
            match self.state {
                State::Preamble => match self.find_delimiter() {
                    Some(at) => {
                        self.buffer.drain(..at + self.delimiter.len());
                        self.state = State::Boundary;
                    }
                    None => {
                        self.buffer.drain(..self.without_tail());
                        return Ok(None);
                    }
                },
                State::Boundary => {
                    let blanks = self.buffer.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
                    if blanks > MAX_HEADERS {
                        return Err(MultipartError::Boundary);
                    }
                    match self.buffer[blanks..] {
                        [b'-', b'-', ..] if blanks == 0 => {
                            self.buffer = Vec::new();
                            self.state = State::End;
                        }
                        [b'\r', b'\n', ..] => {
                            // The end of the line stays, so that empty headers end at once.
                            self.buffer.drain(..blanks);
                            self.state = State::Headers;
                        }
                        [_, _, ..] => return Err(MultipartError::Boundary),
                        _ => return Ok(None),
                    }
                }
                State::Headers => match memchr::memmem::find(&self.buffer, b"\r\n\r\n") {
                    Some(end) if end <= MAX_HEADERS => {
                        let (name, filename) = disposition(&String::from_utf8_lossy(&self.buffer[..end]));
                        self.buffer.drain(..end + 4);
                        self.state = State::Data;
                        return Ok(Some(PartEvent::Part { name, filename }));
                    }
                    // The blank line may be incomplete.
                    None if self.buffer.len() < MAX_HEADERS + 4 => return Ok(None),
                    _ => return Err(MultipartError::LongHeaders),
                },
                State::Data => {
                    let (data, is_end) = match self.find_delimiter() {
                        Some(at) => (at, true),
                        None => (self.without_tail(), false),
                    };
                    if data > 0 {
                        return Ok(Some(PartEvent::Data(self.buffer.drain(..data).collect())));
                    }
                    if !is_end {
                        return Ok(None);
                    }
                    self.buffer.drain(..self.delimiter.len());
                    self.state = State::Boundary;
                    return Ok(Some(PartEvent::PartEnd));
                }
                State::End => return Ok(None),
            }
        }
    }

    /// Checks that the form has ended.
    ///
    /// # Errors
    /// When it has not.
    pub fn finish(&self) -> Result<(), MultipartError> {
        if self.state == State::End { Ok(()) } else { Err(MultipartError::Truncated) }
    }
}

/// The field and the file names in a part's headers.
fn disposition(headers: &str) -> (Option<String>, Option<String>) {
    let value = headers.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.trim().eq_ignore_ascii_case("content-disposition").then_some(value)
    });
    let value = value.unwrap_or_default();
    (parameter(value, "name"), parameter(value, "filename"))
}

/// The boundary in a media type, if it is that of forms.
#[must_use]
pub fn boundary(media_type: &str) -> Option<String> {
    let is_form = media_type.get(..10).is_some_and(|start| start.eq_ignore_ascii_case("multipart/"));
    let boundary = parameter(media_type, "boundary")?;
    (is_form && (1..=MAX_BOUNDARY).contains(&boundary.len())).then_some(boundary)
}

/// A parameter of a header's value: `; name=token` or `; name="text"`.
fn parameter(value: &str, wanted: &str) -> Option<String> {
    let mut rest = value.split_once(';')?.1;
    loop {
        let (name, after) = rest.split_once('=')?;
        let after = after.trim_start();
        let (text, behind) = match after.strip_prefix('"') {
            Some(quoted) => unquote(quoted)?,
            None => {
                let (token, behind) = after.split_once(';').unwrap_or((after, ""));
                (token.trim().to_owned(), behind)
            }
        };
        if name.trim_matches(|letter: char| letter == ';' || letter.is_whitespace()).eq_ignore_ascii_case(wanted) {
            return Some(text);
        }
        rest = behind;
    }
}

fn unquote(quoted: &str) -> Option<(String, &str)> {
    let mut text = String::new();
    let mut letters = quoted.char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Some((text, &quoted[at + 1..])),
            '\\' => match letters.clone().next() {
                Some((_, escaped @ ('"' | '\\'))) => {
                    text.push(escaped);
                    letters.next();
                }
                // A path from Windows.
                _ => text.push('\\'),
            },
            letter => text.push(letter),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Parts = Vec<(Option<String>, Vec<u8>)>;

    fn read(form: &[u8], boundary: &str, cut: usize) -> Result<Parts, MultipartError> {
        let (mut reader, mut parts) = (Multipart::new(boundary), Vec::new());
        for chunk in form.chunks(cut) {
            reader.push(chunk);
            while let Some(event) = reader.next_event()? {
                match event {
                    PartEvent::Part { filename, .. } => parts.push((filename, Vec::new())),
                    PartEvent::Data(data) => parts.last_mut().unwrap().1.extend(data),
                    PartEvent::PartEnd => {}
                }
            }
        }
        reader.finish().map(|()| parts)
    }

    fn form(parts: &[(&str, &[u8])]) -> Vec<u8> {
        let mut form = b"nothing".to_vec();
        for (name, data) in parts {
            let head =
                format!("\r\n--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n");
            form.extend(head.as_bytes());
            form.extend(*data);
        }
        form.extend(b"\r\n--XX--\r\nnothing");
        form
    }

    proptest! {
        #[test]
        fn parts_come_out_as_they_went_in(
            parts in prop::collection::vec(prop::collection::vec(prop::sample::select(b"\r\n-XXa".to_vec()), 0..60), 0..5),
            cut in 1usize..50,
        ) {
            let holds_delimiter = |part: &Vec<u8>| {
                memchr::memmem::find(&[b"\r\n\r\n", &part[..], b"\r\n"].concat()[2..], b"\r\n--XX").is_some()
            };
            prop_assume!(!parts.iter().any(holds_delimiter));
            let named: Vec<(&str, &[u8])> = parts.iter().map(|part| ("a", &part[..])).collect();
            let wanted: Vec<_> = parts.iter().map(|part| (Some("a".to_owned()), part.clone())).collect();
            prop_assert_eq!(read(&form(&named), "XX", cut), Ok(wanted));
        }

        #[test]
        fn anything_is_read_or_refused(bytes in prop::collection::vec(prop::sample::select(b"\r\n-X:a;=\"".to_vec()), 0..300)) {
            let _ = read(&bytes, "X", 7);
        }
    }

    #[test]
    fn a_form_may_begin_and_end_at_once() {
        assert_eq!(read(b"--X--", "X", 100), Ok(vec![]));
        assert_eq!(read(b"--X\r\n\r\nhi\r\n--X--", "X", 1), Ok(vec![(None, b"hi".to_vec())]));
        assert_eq!(read(b"--X\r\n\r\nhi\r\n--X", "X", 100), Err(MultipartError::Truncated));
        assert_eq!(read(b"--Xy\r\n", "X", 100), Err(MultipartError::Boundary));
        let long = [b"--X\r\nA: ".to_vec(), vec![b'a'; MAX_HEADERS]].concat();
        assert_eq!(read(&long, "X", 100), Err(MultipartError::LongHeaders));
    }

    #[test]
    fn names_are_read_with_their_quotes() {
        let of = |text: &str| disposition(&format!("A: b\r\ncontent-disposition:{text}"));
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(of("form-data; name=file; filename=a"), (some("file"), some("a")));
        assert_eq!(of(r#"form-data; name="f;=1"; filename="/a \"b\"\c""#), (some("f;=1"), some(r#"/a "b"\c"#)));
        assert_eq!(of("form-data"), (None, None));
        assert_eq!(of(r#"form-data; name="open"#), (None, None));
        assert_eq!(boundary("multipart/form-data; boundary=\"a b\""), some("a b"));
        assert_eq!(boundary("text/plain; boundary=a"), None);
        assert_eq!(boundary("multipart/form-data"), None);
    }
}
