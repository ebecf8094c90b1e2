//! `blockport io`: single requests to an image, from the command line or typed, in the language of qemu-io.
//!
//! This file owns the session: what is open, where commands come from, and the exit status. `words.rs` reads a command's
//! words, `transfer.rs` moves bytes, `control.rs` does the rest, `report.rs` tells what was done.

mod control;
mod report;
mod transfer;
mod words;

use std::cell::Cell;
use std::io::{BufRead, IsTerminal, Write};
use std::rc::Rc;

use clap::Args;

use super::img::{CacheName, Failure, Image, ImageName, Opening, Session, complain, say};

/// The arguments, with their help.
#[derive(Args, Debug)]
#[command(
    after_help = "The commands, in brief, are told by `blockport io -c help`. The exit status is 1 if one of them failed."
)]
pub struct IoArgs {
    /// A command; without any, they are read from standard input, a line each
    #[arg(short, long = "cmd", value_name = "COMMAND")]
    commands: Vec<String>,

    /// The format of the image [default: told by the end of its name, as .qcow2, else raw]
    #[arg(short, long, value_name = "DRIVER")]
    format: Option<String>,

    /// The image is given as options of a node, as --blockdev takes them, rather than by its file name
    #[arg(long, conflicts_with = "format")]
    image_opts: bool,

    /// Open the image for reading only
    #[arg(short, long)]
    read_only: bool,

    /// How the host caches the image
    #[arg(short = 't', long, value_name = "MODE", value_enum, default_value = "writeback")]
    cache: CacheName,

    /// The same as --cache none
    #[arg(short, long)]
    nocache: bool,

    /// What becomes of discards
    #[arg(short, long, value_name = "MODE", default_value = "unmap", value_parser = ["ignore", "off", "unmap", "on"])]
    discard: String,

    /// Share the image with other processes that write to it; for reading only
    #[arg(short = 'U', long)]
    force_share: bool,

    /// The image; none is open without it
    image: Option<String>,
}

/// What becomes of the session after a command.
enum Next {
    GoOn,
    Quit,
}

/// Why a command was not carried out.
enum Trouble {
    /// Said on standard output, as the result of a request is.
    Said(String),
    /// Said on standard error.
    Complained(String),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Complained(format!("blockport: {failure}"))
    }
}

/// What a command gives.
type Done<T = ()> = Result<T, Trouble>;

/// What is open.
struct Shell {
    session: Session,
    image: Option<Image>,
    name: ImageName,
    opening: Opening,
    /// Requests that were started and have not ended.
    pending: Rc<Cell<usize>>,
}

/// Runs the commands. Returns the exit status.
pub fn run(args: IoArgs) -> u8 {
    match session(args) {
        Ok(status) => status,
        Err(failure) => {
            complain(failure);
            1
        }
    }
}

fn session(args: IoArgs) -> Result<u8, Failure> {
    let opening = Opening {
        writable: !args.read_only,
        cache: if args.nocache { CacheName::None } else { args.cache },
        force_share: args.force_share,
        discard: matches!(args.discard.as_str(), "unmap" | "on"),
        granularity: 1,
        ..Opening::default()
    };
    let name =
        ImageName { text: args.image.clone().unwrap_or_default(), format: args.format, is_options: args.image_opts };
    let mut shell = Shell { session: Session::new()?, image: None, name, opening, pending: Rc::default() };
    if args.image.is_some() {
        shell.open()?;
    }
    let mut failed = false;
    if args.commands.is_empty() {
        let input = std::io::stdin();
        let prompt = || {
            if std::io::stdin().is_terminal() {
                let _ = write!(std::io::stdout(), "io> ");
            }
            let _ = std::io::stdout().flush();
        };
        prompt();
        for line in input.lock().lines() {
            if matches!(shell.command(&line?, &mut failed), Next::Quit) {
                break;
            }
            prompt();
        }
        // As typed commands have said what became of them.
        failed = false;
    }
    for line in &args.commands {
        if matches!(shell.command(line, &mut failed), Next::Quit) {
            break;
        }
    }
    shell.drain();
    shell.close()?;
    Ok(u8::from(failed))
}

impl Shell {
    fn open(&mut self) -> Result<(), Failure> {
        self.image = Some(self.session.open(&self.name, self.opening)?);
        Ok(())
    }

    fn close(&mut self) -> Result<(), Failure> {
        self.drain();
        self.image.take().map_or(Ok(()), |image| self.session.close(image))
    }

    /// Carries a line out.
    fn command(&mut self, line: &str, failed: &mut bool) -> Next {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((name, args)) = words.split_first() else { return Next::GoOn };
        let Some(command) = words::find(name) else {
            eprintln!("command \"{name}\" not found");
            *failed = true;
            return Next::GoOn;
        };
        let done = command.read(args).and_then(|parsed| self.carry_out(command, &parsed));
        match done {
            Ok(next) => next,
            Err(trouble) => {
                *failed = true;
                match trouble {
                    Trouble::Said(text) => {
                        let _ = say(format_args!("{text}\n"));
                    }
                    // A transfer has said it already.
                    Trouble::Complained(text) if text.is_empty() => {}
                    Trouble::Complained(text) => eprintln!("{text}"),
                }
                Next::GoOn
            }
        }
    }

    /// Waits for all requests that were started.
    fn drain(&self) {
        let pending = self.pending.clone();
        self.session.run(async move {
            while pending.get() > 0 {
                blockport_block::aio::AioContext::breathe().await;
            }
        });
    }

    /// The image, which must be open.
    fn opened(&self) -> Done<&Image> {
        self.image.as_ref().ok_or_else(|| Trouble::Complained("no file open, try 'help open'".to_owned()))
    }

    fn writable(&self) -> Done<&Image> {
        let image = self.opened()?;
        if image.node.is_read_only() {
            return Err(Trouble::Complained("blockport: Block node is read-only".to_owned()));
        }
        Ok(image)
    }
}
