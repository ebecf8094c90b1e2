//! The wire: bytes → the JSON values that a client sent, and answers → bytes.
//!
//! This file owns where one message ends and the next begins, what is garbage and how a stream goes on after it, and how
//! answers are written. It never knows what a message means.
//!
//! The stream is one of JSON values, with or without white space between them, not of lines. As in QEMU, strings may stand
//! in single quotes, a byte that no JSON has (0xFF, say) drops what was begun, and after garbage the stream goes on with
//! the next bracket or control character.

use std::io;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

/// The longest message, in bytes. Real ones have a few thousand.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// How deep a message may nest. The parser's own limit lies above it, so that recursion stays bounded.
const NESTING_MAX: u32 = 100;

/// What the stream held.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A whole value by its brackets and quotes; whether it is JSON is for the parser to say.
    Message(Vec<u8>),
    /// Something that is not the beginning of a message, or a message that broke off; says what.
    Garbage(&'static str),
    /// A message that is longer than [`MESSAGE_BYTES_MAX`]. Nothing comes after it.
    TooLong,
}

/// Cuts a stream of bytes into messages, however it was split on its way.
#[derive(Debug, Default)]
pub struct Framer {
    /// What arrived and was not handed out: the message that has begun, then what nobody looked at.
    buffer: Vec<u8>,
    /// How much of it belongs to the message that has begun.
    scanned: usize,
    state: State,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Between,
    /// Inside brackets.
    Nested(Depth),
    /// Inside a string; the byte is the quote that ends it.
    String { depth: Depth, quote: u8, escaped: bool },
    /// A number or keyword that is no part of anything.
    Scalar,
    /// After garbage.
    Recovery,
}

/// Brackets that are open. A wrong one ends a message too: the parser complains then.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Depth {
    braces: i32,
    brackets: i32,
}

impl Depth {
    fn after(self, byte: u8) -> Self {
        let Self { braces, brackets } = self;
        match byte {
            b'{' => Self { braces: braces + 1, brackets },
            b'}' => Self { braces: braces - 1, brackets },
            b'[' => Self { braces, brackets: brackets + 1 },
            b']' => Self { braces, brackets: brackets - 1 },
            _ => self,
        }
    }

    fn is_closed(self) -> bool {
        self.braces < 0 || self.brackets < 0 || (self.braces == 0 && self.brackets == 0)
    }

    fn is_too_deep(self) -> bool {
        self.braces.saturating_add(self.brackets).unsigned_abs() > NESTING_MAX
    }
}

/// What one byte does to the stream.
enum Step {
    /// It belongs to the message.
    Go(State),
    /// It belongs to nothing.
    Skip,
    /// It is the last byte of the message.
    Last,
    /// The message ended before it.
    Ended,
    /// It is looked at again, as the beginning of something.
    Again,
    /// It is JSON's, and wrong here.
    Stray(&'static str),
    /// It is not JSON's, and drops what was begun.
    Garbage(&'static str),
}

impl Framer {
    /// Takes bytes as they arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next thing in the stream; `None` when more must arrive first.
    pub fn next(&mut self) -> Option<Frame> {
        let mut begin = 0;
        let mut at = self.scanned;
        let frame = loop {
            let Some(&byte) = self.buffer.get(at) else { break None };
            match step(self.state, byte) {
                Step::Go(state) => {
                    self.state = state;
                    at += 1;
                    if at - begin > MESSAGE_BYTES_MAX {
                        begin = at;
                        break Some(Frame::TooLong);
                    }
                }
                Step::Skip => {
                    at += 1;
                    begin = at;
                }
                Step::Again => self.state = State::Between,
                step @ (Step::Last | Step::Ended) => {
                    at += usize::from(matches!(step, Step::Last));
                    let message = self.buffer[begin..at].to_vec();
                    self.state = State::Between;
                    begin = at;
                    break Some(Frame::Message(message));
                }
                Step::Stray(why) => {
                    at += 1;
                    begin = at;
                    break Some(Frame::Garbage(why));
                }
                Step::Garbage(why) => {
                    at += 1;
                    begin = at;
                    self.state = State::Recovery;
                    break Some(Frame::Garbage(why));
                }
            }
        };
        self.buffer.drain(..begin);
        self.scanned = at - begin;
        frame
    }

    /// How many bytes wait here.
    #[cfg(test)]
    fn held(&self) -> usize {
        self.buffer.len()
    }
}

fn step(state: State, byte: u8) -> Step {
    const RESET: &str = "a byte that no JSON has";
    match state {
        State::Between => match byte {
            b' ' | b'\t' | b'\r' | b'\n' => Step::Skip,
            b'{' | b'[' => Step::Go(State::Nested(Depth::default().after(byte))),
            b'"' | b'\'' => Step::Go(State::String { depth: Depth::default(), quote: byte, escaped: false }),
            b'-' | b'+' | b'.' | b'_' => Step::Go(State::Scalar),
            byte if byte.is_ascii_alphanumeric() => Step::Go(State::Scalar),
            b'}' | b']' | b':' | b',' => Step::Stray("a value was expected"),
            _ => Step::Garbage(RESET),
        },
        State::Scalar => match byte {
            b'-' | b'+' | b'.' | b'_' => Step::Go(state),
            byte if byte.is_ascii_alphanumeric() => Step::Go(state),
            _ => Step::Ended,
        },
        State::Nested(depth) => match byte {
            b'"' | b'\'' => Step::Go(State::String { depth, quote: byte, escaped: false }),
            b'{' | b'[' if depth.after(byte).is_too_deep() => Step::Garbage("it nests too deep"),
            b'}' | b']' if depth.after(byte).is_closed() => Step::Last,
            b' '..=b'~' | b'\t' | b'\r' | b'\n' => Step::Go(State::Nested(depth.after(byte))),
            _ => Step::Garbage(RESET),
        },
        State::String { depth, quote, escaped } => match byte {
            0..b' ' => Step::Garbage("a control character in a string"),
            0xFE | 0xFF => Step::Garbage(RESET),
            _ if escaped => Step::Go(State::String { depth, quote, escaped: false }),
            b'\\' => Step::Go(State::String { depth, quote, escaped: true }),
            byte if byte == quote && depth == Depth::default() => Step::Last,
            byte if byte == quote => Step::Go(State::Nested(depth)),
            _ => Step::Go(state),
        },
        State::Recovery => match byte {
            b'{' | b'}' | b'[' | b']' => Step::Again,
            0..b' ' if byte != b'\t' => Step::Again,
            _ => Step::Skip,
        },
    }
}

/// Writes a value and an end of line, in ASCII: `{"return": {}}`, or over several lines if `pretty`.
pub fn write(out: &mut Vec<u8>, value: &impl Serialize, pretty: bool) {
    // Writing to memory does not fail, and no value of ours has keys that are no strings.
    let _ = if pretty {
        value.serialize(&mut serde_json::Serializer::with_formatter(
            &mut *out,
            Ascii(PrettyFormatter::with_indent(b"    ")),
        ))
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut *out, Ascii(Spaced(CompactFormatter))))
    };
    out.extend_from_slice(b"\r\n");
}

/// A blank after each comma and colon, as people grep for.
struct Spaced(CompactFormatter);

/// What is not ASCII is escaped, so that no client must know an encoding.
struct Ascii<F>(F);

impl Formatter for Spaced {
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
}

macro_rules! passed_on {
    ($($method:ident($($argument:ident: $kind:ty),*);)*) => {
        $(fn $method<W: ?Sized + io::Write>(&mut self, writer: &mut W, $($argument: $kind),*) -> io::Result<()> {
            self.0.$method(writer, $($argument),*)
        })*
    };
}

impl<F: Formatter> Formatter for Ascii<F> {
    passed_on! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        end_object_key();
        begin_object_value();
        end_object_value();
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for part in fragment.split_inclusive(|c: char| !c.is_ascii() || c == '\x7f') {
            let mut plain = part.chars();
            match plain.next_back() {
                Some(last) if !last.is_ascii() || last == '\x7f' => {
                    writer.write_all(plain.as_str().as_bytes())?;
                    for unit in last.encode_utf16(&mut [0; 2]) {
                        write!(writer, "\\u{unit:04x}")?;
                    }
                }
                _ => writer.write_all(part.as_bytes())?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
