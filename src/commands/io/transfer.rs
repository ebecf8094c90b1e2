//! Transfer: reads and writes, at once or started and left to end by themselves. It owns what their flags mean and what is
//! verified.

use std::future::Future;
use std::rc::Rc;
use std::time::Instant;

use blockport_block::driver::WriteFlags;
use blockport_block::iovec::{self, AlignedBuffer, IoVec};
use blockport_block::{BlockResult, ChildChannel, SECTOR};

use super::report::{Report, dump, named};
use super::words::{BYTES_MAX, Command, Words, length, number};
use super::{Done, Shell, Trouble};
use crate::commands::img::{BUFFER_ALIGNMENT, say};

/// What is written unless stated.
const FILLING: u8 = 0xcd;
/// What buffers hold before something is read into them.
const UNREAD: u8 = 0xab;

/// A request that has been understood.
struct Transfer {
    channel: Rc<ChildChannel>,
    offset: u64,
    lengths: Vec<u64>,
    kind: Kind,
    quiet: bool,
    compact: bool,
    dump: bool,
    /// As errors call it.
    name: &'static str,
}

enum Kind {
    /// Verified against a byte, from a place on, for a length.
    Read {
        pattern: Option<(u8, u64, u64)>,
    },
    Write {
        filling: Filling,
        flags: WriteFlags,
    },
    Zeroes {
        flags: WriteFlags,
    },
}

enum Filling {
    Byte(u8),
    /// Over and over.
    Bytes(Vec<u8>),
}

impl Transfer {
    fn bytes(&self) -> u64 {
        self.lengths.iter().sum()
    }

    fn verb(&self) -> &'static str {
        if matches!(self.kind, Kind::Read { .. }) { "read" } else { "wrote" }
    }

    /// Carries it out and says what became of it. False if it failed.
    async fn run(self) -> bool {
        let started = Instant::now();
        let bytes = self.bytes();
        let buffer = AlignedBuffer::new(usize::try_from(bytes).unwrap_or(0), BUFFER_ALIGNMENT);
        let done = self.go(&buffer).await;
        let took = started.elapsed();
        if let Err(error) = done {
            let _ = say(format_args!("{} failed: {}\n", self.name, named(error)));
            return false;
        }
        let mut good = true;
        if let Kind::Read { pattern: Some((byte, skip, length)) } = self.kind {
            let content = buffer.to_vec();
            let part = content.iter().skip(skip as usize).take(length as usize);
            if part.clone().any(|found| *found != byte) {
                let at = self.offset + skip;
                let _ = say(format_args!("Pattern verification failed at offset {at}, {length} bytes\n"));
                good = false;
            }
        }
        if !self.quiet {
            if self.dump && matches!(self.kind, Kind::Read { .. }) {
                let _ = say(dump(&buffer.to_vec(), self.offset));
            }
            let (verb, offset, compact) = (self.verb(), self.offset, self.compact);
            let _ = say(Report { verb, offset, bytes, total: bytes, took, compact }.text());
        }
        good
    }

    async fn go(&self, buffer: &AlignedBuffer) -> BlockResult {
        let whole = buffer.iov();
        let mut at = 0;
        let pieces: Vec<IoVec> = self
            .lengths
            .iter()
            .map(|length| {
                let piece = whole.part(at, *length as usize);
                at += piece.len();
                piece
            })
            .collect();
        match &self.kind {
            Kind::Read { .. } => {
                iovec::fill(&[whole], UNREAD);
                self.channel.preadv(self.offset, &pieces).await
            }
            Kind::Write { filling, flags } => {
                match filling {
                    Filling::Byte(byte) => iovec::fill(&[whole], *byte),
                    Filling::Bytes(bytes) => {
                        let content: Vec<u8> = bytes.iter().copied().cycle().take(buffer.len()).collect();
                        iovec::fill_from(&[whole], &content);
                    }
                }
                self.channel.pwritev(self.offset, &pieces, *flags).await
            }
            Kind::Zeroes { flags } => self.channel.pwrite_zeroes(self.offset, self.bytes(), *flags).await,
        }
    }
}

impl Shell {
    /// read, write, readv, writev.
    pub(super) fn transfer(&self, command: &'static Command, words: &Words) -> Done {
        let transfer = self.understood(command, words)?;
        if self.session.run(transfer.run()) { Ok(()) } else { Err(Trouble::Complained(String::new())) }
    }

    /// aio_read, aio_write: started, and said when it is done.
    pub(super) fn start(&self, command: &'static Command, words: &Words) -> Done {
        let transfer = self.understood(command, words)?;
        let pending = self.pending.clone();
        pending.set(pending.get() + 1);
        let work = async move {
            transfer.run().await;
            pending.set(pending.get() - 1);
        };
        self.spawn(work);
        Ok(())
    }

    fn spawn(&self, work: impl Future<Output = ()> + 'static) {
        self.session.context.spawn(work);
    }

    fn understood(&self, command: &'static Command, words: &Words) -> Done<Transfer> {
        let reads = matches!(command.name, "read" | "readv" | "aio_read");
        let one_length = matches!(command.name, "read" | "write");
        let image = if reads { self.opened()? } else { self.writable()? };
        let [place, rest @ ..] = words.rest.as_slice() else { return Err(command.misused()) };
        if rest.is_empty() || (one_length && rest.len() != 1) {
            return Err(command.misused());
        }
        let byte = words.pattern('P')?;
        let source = if reads { None } else { words.value('s') };
        let zeroes = words.has('z');
        let said = |text: &str| Err(Trouble::Said(text.to_owned()));
        if command.name == "write" {
            let sources = [zeroes, byte.is_some(), source.is_some()].into_iter().filter(|given| *given).count();
            if words.has('b') {
                return said("the state of a machine cannot be written here");
            }
            if words.has('f') && (words.has('c') || words.has('b')) {
                return said("-f and -b or -c cannot be specified at the same time");
            }
            if words.has('n') && !zeroes {
                return said("-n requires -z to be specified");
            }
            if words.has('u') && !zeroes {
                return said("-u requires -z to be specified");
            }
            if sources > 1 {
                return said("Only one of -z, -P, and -s can be specified at the same time");
            }
        }
        if command.name == "aio_write" {
            if rest.len() > 1 && zeroes {
                return said("-z supports only a single length parameter");
            }
            if words.has('u') && !zeroes {
                return said("-u requires -z to be specified");
            }
        }
        let offset = number(place)?;
        let lengths: Vec<u64> = rest.iter().map(|text| length(text)).collect::<Done<_>>()?;
        if lengths.iter().sum::<u64>() > BYTES_MAX {
            return Err(Trouble::Said("the lengths together are too large".to_owned()));
        }
        let all = lengths.iter().sum();
        let flags = WriteFlags {
            kept: false,
            fua: words.has('f') || image.writes_through,
            may_unmap: words.has('u'),
            no_fallback: words.has('n'),
            compressed: words.has('c') && !zeroes,
        };
        if flags.compressed {
            aligned("offset", offset)?;
            aligned("length", all)?;
        }
        let kind = match (reads, zeroes, source) {
            (true, ..) => Kind::Read { pattern: verified(command, words, byte, all)? },
            (_, true, _) => Kind::Zeroes { flags },
            (_, _, Some(path)) => {
                let content = std::fs::read(path).map_err(|e| {
                    let reason = e.to_string();
                    Trouble::Said(format!("{path}: {}", reason.split(" (os error").next().unwrap_or_default()))
                })?;
                if content.is_empty() {
                    return Err(Trouble::Said(format!("{path}: file is empty")));
                }
                Kind::Write { filling: Filling::Bytes(content), flags }
            }
            _ => Kind::Write { filling: Filling::Byte(byte.unwrap_or(FILLING)), flags },
        };
        Ok(Transfer {
            channel: image.channel.clone(),
            offset,
            lengths,
            kind,
            quiet: words.has('q'),
            compact: words.has('C'),
            dump: words.has('v'),
            name: command.name,
        })
    }
}

/// What a read is verified against.
fn verified(command: &Command, words: &Words, byte: Option<u8>, all: u64) -> Done<Option<(u8, u64, u64)>> {
    let skip = words.value('s').map(number).transpose()?;
    let part = words.value('l').map(number).transpose()?;
    let Some(byte) = byte else {
        return if skip.is_some() || part.is_some() { Err(command.misused()) } else { Ok(None) };
    };
    let skip = skip.unwrap_or(0);
    let part = part.unwrap_or(all.saturating_sub(skip));
    if skip.checked_add(part).is_none_or(|end| end > all) {
        return Err(Trouble::Said("pattern verification range exceeds end of read data".to_owned()));
    }
    Ok(Some((byte, skip, part)))
}

fn aligned(what: &str, bytes: u64) -> Done {
    if bytes.is_multiple_of(SECTOR) {
        return Ok(());
    }
    Err(Trouble::Said(format!("{bytes} is not a sector-aligned value for '{what}'")))
}
