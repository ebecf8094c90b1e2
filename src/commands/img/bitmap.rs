//! `img bitmap`: bitmaps inside an image, which say what was written. It owns the order of what is asked together.

use blockport_block::drivers::qcow2::{self, NewBitmap};
use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::image::{ImageArgs, ImageName, Opening};
use super::task::Session;
use super::{Failure, Outcome, units};

/// The arguments, with their help.
#[derive(Args, Debug)]
struct Plain {
    #[command(flatten)]
    image: ImageArgs,

    /// Make BITMAP, and have writes marked in it from now on
    #[arg(long)]
    add: bool,

    /// The bytes that one bit of the new bitmap stands for
    #[arg(short, long, value_name = "SIZE")]
    granularity: Option<String>,

    /// Remove BITMAP
    #[arg(long)]
    remove: bool,

    /// Mark nothing in BITMAP any more
    #[arg(long)]
    clear: bool,

    /// Have writes marked in BITMAP
    #[arg(long)]
    enable: bool,

    /// Have writes marked in BITMAP no longer
    #[arg(long)]
    disable: bool,

    /// Mark in BITMAP what is marked in this one
    #[arg(long, value_name = "BITMAP")]
    merge: Vec<String>,

    /// The image that holds the bitmaps to merge, if it is another one
    #[arg(short = 'b', long, value_name = "FILE", requires = "merge")]
    source_file: Option<String>,

    /// The format of that
    #[arg(short = 'F', long, value_name = "DRIVER", requires = "source_file")]
    source_format: Option<String>,

    /// The image
    filename: String,

    /// The bitmap
    bitmap: String,
}

/// The arguments, and what is asked in the order in which it stands.
#[derive(Debug)]
pub struct BitmapArgs {
    plain: Plain,
    actions: Vec<Action>,
}

#[derive(Debug, Clone)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable(bool),
    Merge(String),
}

impl FromArgMatches for BitmapArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let plain = Plain::from_arg_matches(matches)?;
        let mut actions: Vec<(usize, Action)> = Vec::new();
        for (id, action) in [
            ("add", Action::Add),
            ("remove", Action::Remove),
            ("clear", Action::Clear),
            ("enable", Action::Enable(true)),
            ("disable", Action::Enable(false)),
        ] {
            if matches.get_flag(id) {
                actions.extend(matches.indices_of(id).into_iter().flatten().map(|at| (at, action.clone())));
            }
        }
        let merges = matches.indices_of("merge").into_iter().flatten().zip(&plain.merge);
        actions.extend(merges.map(|(at, name)| (at, Action::Merge(name.clone()))));
        actions.sort_by_key(|(at, _)| *at);
        Ok(Self { plain, actions: actions.into_iter().map(|(_, action)| action).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for BitmapArgs {
    fn augment_args(command: Command) -> Command {
        Plain::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Plain::augment_args_for_update(command)
    }
}

impl BitmapArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let Self { plain: args, actions } = self;
        if actions.is_empty() {
            return Err("say what to do: --add, --remove, --clear, --enable, --disable or --merge".into());
        }
        let adds = actions.iter().any(|action| matches!(action, Action::Add));
        let granularity = args.granularity.as_deref().map(|text| units::size("--granularity", text)).transpose()?;
        if granularity.is_some() && !adds {
            return Err("--granularity is for --add".into());
        }
        let session = Session::new()?;
        // The bitmaps of an image are its own: what is behind it does not matter.
        let opening = Opening { writable: true, alone: true, ..args.image.reading() };
        let image = session.open(&args.image.name(&args.filename), opening)?;
        let source = match &args.source_file {
            Some(file) => {
                let name = ImageName::file(file, args.source_format.clone());
                Some(session.open(&name, Opening { alone: true, ..Opening::default() })?)
            }
            None => None,
        };
        let name = args.bitmap.as_str();
        for action in actions {
            let done: Result<(), Failure> = match action {
                Action::Add => {
                    let new = NewBitmap { name: name.to_owned(), granularity, enabled: true };
                    qcow2::bitmap_add(&image.node, &new).map_err(Failure::from)
                }
                Action::Remove => qcow2::bitmap_remove(&image.node, name).map_err(Failure::from),
                Action::Clear => qcow2::bitmap_clear(&image.node, name).map_err(Failure::from),
                Action::Enable(on) => qcow2::bitmap_enable(&image.node, name, on).map_err(Failure::from),
                Action::Merge(from) => {
                    let node = source.as_ref().map_or(&image.node, |source| &source.node);
                    qcow2::bitmap_merge(&image.node, name, node, &from).map_err(Failure::from)
                }
            };
            done.map_err(|failure| failure.context(format_args!("the bitmap \"{name}\"")))?;
        }
        session.close(image)?;
        Ok(0)
    }
}
