//! Words: the commands with their flags, and how a line is read. It owns the grammar; it carries nothing out.

use blockport_block::options::parse_size;

use super::{Done, Trouble};

/// The most bytes of a request: what fits into 31 bits, in whole sectors.
pub const BYTES_MAX: u64 = 0x7fff_fe00;

/// A command.
pub struct Command {
    pub name: &'static str,
    /// Another name for it; may be empty.
    short: &'static str,
    /// Its flags, each with a colon behind it if it has a value.
    flags: &'static str,
    /// Fewest and most words besides flags and their values; the flags count for the fewest, as in qemu-io.
    fewest: usize,
    most: usize,
    usage: &'static str,
    meaning: &'static str,
}

/// A command's words, read.
#[derive(Default)]
pub struct Words {
    flags: Vec<(char, Option<String>)>,
    pub rest: Vec<String>,
}

const fn command(
    names: (&'static str, &'static str),
    flags: &'static str,
    counts: (usize, usize),
    usage: &'static str,
    meaning: &'static str,
) -> Command {
    Command { name: names.0, short: names.1, flags, fewest: counts.0, most: counts.1, usage, meaning }
}

const ANY: usize = usize::MAX;

/// All commands.
pub const COMMANDS: &[Command] = &[
    command(
        ("read", "r"),
        "bCl:pP:qrs:v",
        (2, ANY),
        "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
    ),
    command(
        ("write", "w"),
        "bcCfnpP:qrs:uz",
        (2, ANY),
        "[-bcCfnqruz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
    ),
    command(
        ("readv", ""),
        "CP:qrv",
        (2, ANY),
        "[-Cqrv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
    ),
    command(
        ("writev", ""),
        "CfP:qr",
        (2, ANY),
        "[-Cfqr] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
    ),
    command(
        ("aio_read", ""),
        "CP:iqrv",
        (2, ANY),
        "[-Ciqrv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
    ),
    command(
        ("aio_write", ""),
        "CfiP:qruz",
        (2, ANY),
        "[-Cfiqruz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
    ),
    command(("aio_flush", ""), "", (0, 0), "", "completes all outstanding aio requests"),
    command(("flush", "f"), "", (0, 0), "", "flush all in-core file state to disk"),
    command(("discard", "d"), "Cq", (2, ANY), "[-Cq] off len", "discards a number of bytes at a specified offset"),
    command(
        ("truncate", "t"),
        "m:",
        (1, 3),
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
    ),
    command(("length", "l"), "", (0, 0), "", "gets the length of the current file"),
    command(("map", ""), "", (0, 1), "", "prints the allocated areas of a file"),
    command(("alloc", "a"), "", (1, 2), "offset [count]", "checks if offset is allocated in the file"),
    command(("info", "i"), "", (0, 0), "", "prints information about the current file"),
    command(
        ("open", "o"),
        "Crsnkrd:o:t:U",
        (0, ANY),
        "[-rnU] [-t cache] [-d discard] [-o options] [path]",
        "opens the file specified by path",
    ),
    command(
        ("reopen", ""),
        "c:o:rw",
        (0, ANY),
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
    ),
    command(("close", "c"), "", (0, 0), "", "closes the current open file"),
    command(("sleep", ""), "", (1, 1), "", "waits for the given value in milliseconds"),
    command(("quit", "q"), "", (0, 0), "", "exits"),
    command(("help", "?"), "", (0, 1), "[command]", "help for one or all commands"),
];

/// The command of that name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name || (!command.short.is_empty() && command.short == name))
}

impl Command {
    /// The command in a line.
    pub fn summary(&self) -> String {
        let usage = if self.usage.is_empty() { String::new() } else { format!("{} ", self.usage) };
        format!("{} {usage}-- {}", self.name, self.meaning)
    }

    /// The line that says how it is written.
    pub fn misused(&self) -> Trouble {
        Trouble::Said(self.summary())
    }

    /// Reads the words behind its name.
    pub fn read(&self, words: &[&str]) -> Done<Words> {
        if words.len() < self.fewest || words.len() > self.most {
            let expected = match (self.fewest, self.most) {
                (fewest, ANY) => format!("at least {fewest} arguments"),
                (fewest, most) if fewest == most => format!("{most} arguments"),
                (fewest, most) => format!("between {fewest} and {most} arguments"),
            };
            let text = format!("bad argument count {} to {}, expected {expected}", words.len(), self.name);
            return Err(Trouble::Complained(text));
        }
        let mut read = Words::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(flags) = word.strip_prefix('-').filter(|flags| !flags.is_empty()) else {
                read.rest.push((*word).to_owned());
                continue;
            };
            for (at, letter) in flags.char_indices() {
                let Some(place) = self.flags.find(letter).filter(|_| letter != ':') else {
                    eprintln!("{}: invalid option -- '{letter}'", self.name);
                    return Err(self.misused());
                };
                if !self.flags[place + letter.len_utf8()..].starts_with(':') {
                    read.flags.push((letter, None));
                    continue;
                }
                let behind = &flags[at + letter.len_utf8()..];
                let value = if behind.is_empty() { words.next().copied() } else { Some(behind) };
                let Some(value) = value else {
                    eprintln!("{}: option requires an argument -- '{letter}'", self.name);
                    return Err(self.misused());
                };
                read.flags.push((letter, Some(value.to_owned())));
                break;
            }
        }
        Ok(read)
    }
}

impl Words {
    pub fn has(&self, flag: char) -> bool {
        self.flags.iter().any(|(letter, _)| *letter == flag)
    }

    /// The value of a flag, the last one given.
    pub fn value(&self, flag: char) -> Option<&str> {
        self.flags.iter().rev().find(|(letter, _)| *letter == flag).and_then(|(_, value)| value.as_deref())
    }

    /// The byte that a flag states.
    pub fn pattern(&self, flag: char) -> Done<Option<u8>> {
        let Some(text) = self.value(flag) else { return Ok(None) };
        let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) => u8::from_str_radix(digits, 16).ok(),
            None if text.starts_with('0') && text.len() > 1 => u8::from_str_radix(text, 8).ok(),
            None => text.parse().ok(),
        };
        parsed.map(Some).ok_or_else(|| Trouble::Said(format!("{text} is not a valid pattern byte")))
    }
}

/// A number of bytes.
pub fn number(text: &str) -> Done<u64> {
    if let Some(number) = parse_size(text) {
        return Ok(number);
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let too_large = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit());
    Err(Trouble::Said(
        if too_large && text.len() - digits.len() <= 1 && parse_size(&format!("1{}", &text[digits.len()..])).is_some() {
            format!("Parsing error: argument too large -- {text}")
        } else {
            format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
        },
    ))
}

/// A number of bytes to move.
pub fn length(text: &str) -> Done<u64> {
    let bytes = number(text)?;
    if bytes > BYTES_MAX {
        return Err(Trouble::Said(format!("length cannot exceed {BYTES_MAX}, given {text}")));
    }
    Ok(bytes)
}
