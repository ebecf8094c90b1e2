//! Control: everything that moves no bytes of its own: sizes, allocation, opening and closing. It owns the dispatch of
//! commands.

use std::time::{Duration, Instant};

use blockport_block::drivers::qcow2;
use blockport_block::options::parse_keyval;
use blockport_block::{BlockError, BlockResult, SECTOR};
use clap::ValueEnum;

use super::report::{Report, named};
use super::words::{COMMANDS, Command, Words, find, length, number};
use super::{Done, Next, Shell, Trouble};
use crate::commands::img::{CacheName, Image, cut_size, format_details, say};

impl Shell {
    /// Carries a command out.
    pub(super) fn carry_out(&mut self, command: &'static Command, words: &Words) -> Done<Next> {
        match command.name {
            "read" | "write" | "readv" | "writev" => self.transfer(command, words)?,
            "aio_read" | "aio_write" => self.start(command, words)?,
            "aio_flush" => {
                self.opened()?;
                self.drain();
            }
            "flush" => {
                let channel = self.opened()?.channel.clone();
                self.session.run(async move { channel.flush().await }).map_err(|e| failed("flush", e))?;
            }
            "discard" => self.discard(command, words)?,
            "truncate" => self.truncate(command, words)?,
            "length" => said(cut_size(self.opened()?.length() as f64))?,
            "map" => self.map()?,
            "alloc" => self.alloc(words)?,
            "info" => info(self.opened()?)?,
            "open" => self.open_another(command, words)?,
            "reopen" => self.reopen(command, words)?,
            "close" => {
                self.opened()?;
                self.close()?;
            }
            "sleep" => {
                let milliseconds = words.rest.first().and_then(|text| text.parse().ok());
                let milliseconds = milliseconds.ok_or_else(|| command.misused())?;
                let context = self.session.context.clone();
                self.session.run(async move { context.sleep(Duration::from_millis(milliseconds)).await });
            }
            "quit" => return Ok(Next::Quit),
            "help" => help(words)?,
            _ => return Err(command.misused()),
        }
        Ok(Next::GoOn)
    }

    fn discard(&self, command: &Command, words: &Words) -> Done {
        let channel = self.writable()?.channel.clone();
        let [offset, bytes] = words.rest.as_slice() else { return Err(command.misused()) };
        let (offset, bytes) = (number(offset)?, length(bytes)?);
        let started = Instant::now();
        let done = self.session.run(async move { channel.pdiscard(offset, bytes).await });
        done.map_err(|e| failed("discard", e))?;
        if !words.has('q') {
            let (took, compact) = (started.elapsed(), words.has('C'));
            let report = Report { verb: "discard", offset, bytes, total: bytes, took, compact };
            say(report.text()).map_err(Trouble::from)?;
        }
        Ok(())
    }

    fn truncate(&mut self, command: &Command, words: &Words) -> Done {
        self.writable()?;
        let [size] = words.rest.as_slice() else { return Err(command.misused()) };
        let size = number(size)?;
        if words.value('m').is_some_and(|mode| mode != "off") {
            return Err(Trouble::Complained("blockport: only the mode off is supported here".to_owned()));
        }
        self.drain();
        match &mut self.image {
            Some(image) => Ok(self.session.resize(image, size)?),
            None => Ok(()),
        }
    }

    /// How many bytes from `offset` on are allocated in the image itself, or are not, and which; at most `bytes`.
    fn allocated(&self, offset: u64, bytes: u64) -> Done<(bool, u64)> {
        let channel = self.opened()?.channel.clone();
        let found = self.session.run(async move {
            let end = offset + bytes;
            let mut at = offset;
            let mut found = None;
            while at < end {
                let status = channel.block_status(at, end - at).await?;
                if found.is_some_and(|found| found != status.allocated) {
                    break;
                }
                found = Some(status.allocated);
                at += status.bytes;
            }
            BlockResult::Ok((found.unwrap_or(false), at - offset))
        });
        found.map_err(|e| failed("is_allocated", e))
    }

    fn map(&self) -> Done {
        let end = self.opened()?.length();
        if end == 0 {
            return Err(Trouble::Complained("blockport: the disk has no bytes".to_owned()));
        }
        let mut at = 0;
        while at < end {
            let (allocated, bytes) = self.allocated(at, end - at)?;
            let is = if allocated { "    allocated" } else { "not allocated" };
            let (size, place) = (cut_size(bytes as f64), cut_size(at as f64));
            said(format!("{size} ({bytes:#x}) bytes {is} at offset {place} ({at:#x})"))?;
            at += bytes;
        }
        Ok(())
    }

    fn alloc(&self, words: &Words) -> Done {
        let end = self.opened()?.length();
        let [start, count @ ..] = words.rest.as_slice() else { return Ok(()) };
        let start = number(start)?;
        let bytes = count.first().map(|text| number(text)).transpose()?.unwrap_or(SECTOR);
        // What lies behind the end does not count.
        let bytes = bytes.min(end.saturating_sub(start));
        let stop = start + bytes;
        let (mut at, mut sum) = (start, 0);
        while at < stop {
            let (allocated, bytes) = self.allocated(at, stop - at)?;
            sum += if allocated { bytes } else { 0 };
            at += bytes;
        }
        said(format!("{sum}/{bytes} bytes allocated at offset {}", cut_size(start as f64)))
    }

    fn open_another(&mut self, command: &Command, words: &Words) -> Done {
        if self.image.is_some() {
            return Err(Trouble::Complained("file open already, try 'help close'".to_owned()));
        }
        let (options, path) = match (words.value('o'), words.rest.as_slice()) {
            (Some(options), []) => (Some(options), ""),
            (Some(options), [path]) => (Some(options), path.as_str()),
            (None, [path]) => (None, path.as_str()),
            _ => return Err(command.misused()),
        };
        let mut name = self.name.clone();
        (name.text, name.is_options) = (path.to_owned(), false);
        if let Some(text) = options {
            let mut parsed = parse_keyval(text, None).map_err(|e| Trouble::Complained(format!("blockport: {e}")))?;
            if path.is_empty() {
                (name.text, name.is_options, name.format) = (text.to_owned(), true, None);
            } else {
                name.format = parsed.take_str("driver").ok().flatten();
                parsed.finish().map_err(|e| Trouble::Complained(format!("blockport: -o: {e}")))?;
            }
        }
        let mut opening = self.opening;
        opening.writable = !words.has('r');
        opening.force_share = words.has('U');
        opening.cache =
            cache(words, 't')?.unwrap_or(if words.has('n') { CacheName::None } else { CacheName::Writeback });
        opening.discard = words.value('d').is_none_or(|mode| matches!(mode, "unmap" | "on"));
        (self.name, self.opening) = (name, opening);
        Ok(self.open()?)
    }

    fn reopen(&mut self, command: &Command, words: &Words) -> Done {
        self.opened()?;
        if words.has('r') && words.has('w') {
            return Err(Trouble::Complained("blockport: Only one -r/-w option may be given".to_owned()));
        }
        if !words.rest.is_empty() {
            return Err(command.misused());
        }
        if words.has('o') {
            return Err(Trouble::Complained(
                "blockport: -o is not supported here; close and open do the same".to_owned(),
            ));
        }
        let before = self.opening;
        self.opening.writable = (before.writable || words.has('w')) && !words.has('r');
        self.opening.cache = cache(words, 'c')?.unwrap_or(before.cache);
        self.close()?;
        if let Err(failure) = self.open() {
            self.opening = before;
            self.open()?;
            return Err(failure.into());
        }
        Ok(())
    }
}

fn said(text: impl std::fmt::Display) -> Done {
    say(format_args!("{text}\n")).map_err(Trouble::from)
}

fn failed(what: &str, error: BlockError) -> Trouble {
    match error {
        BlockError::ReadOnly => Trouble::Complained("blockport: Block node is read-only".to_owned()),
        error => Trouble::Said(format!("{what} failed: {}", named(error))),
    }
}

/// The cache mode that a flag states.
fn cache(words: &Words, flag: char) -> Done<Option<CacheName>> {
    let Some(text) = words.value(flag) else { return Ok(None) };
    let mode =
        CacheName::from_str(text, false).map_err(|_| Trouble::Complained(format!("Invalid cache option: {text}")))?;
    Ok(Some(mode))
}

/// What the image is, as a driver sees it.
fn info(image: &Image) -> Done {
    let details = qcow2::info(&image.node).ok();
    let cluster = details.as_ref().map_or(0, |details| details.cluster_size);
    // Behind the part of the disk that the tables of the first level map.
    let state = details.as_ref().map_or(0, |details| {
        let entries = cluster / if details.extended_l2 { 16 } else { 8 };
        details.size.next_multiple_of(entries * cluster)
    });
    said(format!("format name: {}", image.node.driver_name()))?;
    said(format!("cluster size: {}", cut_size(cluster as f64)))?;
    said(format!("vm state offset: {}", cut_size(state as f64)))?;
    if details.is_some() {
        say(format_details(&image.node)).map_err(Trouble::from)?;
    }
    Ok(())
}

fn help(words: &Words) -> Done {
    match words.rest.first() {
        None => COMMANDS.iter().try_for_each(|command| said(command.summary())),
        Some(name) => match find(name) {
            Some(command) => said(command.summary()),
            None => Err(Trouble::Said(format!("command {name} not found"))),
        },
    }
}
