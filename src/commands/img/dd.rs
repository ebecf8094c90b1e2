//! `img dd`: blocks of an image as a new one. It owns the operands, which are those of dd.

use std::rc::Rc;

use blockport_block::BlockResult;
use blockport_block::driver::BoxFuture;
use blockport_block::iovec::IoVec;
use clap::Args;

use super::copy::{Part, Settings, Source, What, copy};
use super::format::Format;
use super::image::{CacheName, ImageArgs, ImageName, Opening, format_by_name};
use super::progress::Progress;
use super::task::{Image, Session};
use super::{Failure, Outcome, target, units};

/// The arguments, with their help.
#[derive(Args, Debug)]
#[command(
    after_help = "bs is 512 unless stated; count blocks are copied, all that follow unless stated, after skip blocks are left out."
)]
pub struct DdArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The format of the new image [default: told by the end of its name, as .qcow2, else raw]
    #[arg(short = 'O', long, value_name = "DRIVER")]
    output_format: Option<String>,

    /// if=FILE of=FILE [bs=SIZE] [count=BLOCKS] [skip=BLOCKS]
    #[arg(value_name = "OPERAND", required = true)]
    operands: Vec<String>,
}

/// The operands.
#[derive(Default)]
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: Option<u64>,
    count: Option<u64>,
    skip: Option<u64>,
}

impl Operands {
    fn parse(texts: &[String]) -> Result<Self, Failure> {
        let mut operands = Self::default();
        for text in texts {
            let Some((name, value)) = text.split_once('=') else {
                return Err(format!("\"{text}\" is no operand: write NAME=VALUE").into());
            };
            match name {
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                "bs" => operands.block = Some(units::size("bs", value)?).filter(|bytes| (1..=1 << 30).contains(bytes)),
                "count" => operands.count = Some(units::size("count", value)?),
                "skip" => operands.skip = Some(units::size("skip", value)?),
                _ => {
                    return Err(
                        format!("the operand \"{name}\" is unknown: there are if, of, bs, count and skip").into()
                    );
                }
            }
            if name == "bs" && operands.block.is_none() {
                return Err("bs must be from 1 to 1G".into());
            }
        }
        Ok(operands)
    }
}

impl DdArgs {
    /// Carries it out.
    pub fn run(self) -> Outcome {
        let operands = Operands::parse(&self.operands)?;
        let input = operands.input.ok_or("the operand if=FILE is missing")?;
        let output = operands.output.ok_or("the operand of=FILE is missing")?;
        let session = Session::new()?;
        let image = session.open(&self.image.name(input), self.image.reading())?;
        image.is_not_at(&output)?;
        let block = operands.block.unwrap_or(512);
        let start = operands.skip.unwrap_or(0).saturating_mul(block).min(image.length());
        let most = operands.count.map_or(u64::MAX, |count| count.saturating_mul(block));
        let bytes = (image.length() - start).min(most);
        let driver = self.output_format.clone().unwrap_or_else(|| format_by_name(&output).to_owned());
        let format = Format::parse(&driver, &[])?;
        let made = target::create(&session, &output, &format, bytes.next_multiple_of(512))?;
        let opening = Opening { writable: true, cache: CacheName::Unsafe, ..Opening::default() };
        let target = session.open(&ImageName::file(&output, Some(driver)), opening)?;
        let source = Rc::new(Window { image, start, bytes });
        let zero_from = (!super::image::is_device(&output)).then_some(0);
        copy(&session, source, &target, Settings { zero_from, ..Settings::default() }, Progress::new(false, bytes))?;
        session.close(target)?;
        made.keep();
        Ok(0)
    }
}

/// A part of an image.
struct Window {
    image: Image,
    start: u64,
    bytes: u64,
}

impl Source for Window {
    fn length(&self) -> u64 {
        self.bytes
    }

    fn part(self: Rc<Self>, offset: u64, bytes: u64) -> BoxFuture<BlockResult<Part>> {
        Box::pin(async move {
            let status = self.image.channel.block_status(self.start + offset, bytes).await?;
            Ok(Part { bytes: status.bytes, what: if status.zero { What::Zero } else { What::Data } })
        })
    }

    fn read(self: Rc<Self>, offset: u64, iov: IoVec) -> BoxFuture<BlockResult> {
        Box::pin(async move { self.image.channel.preadv(self.start + offset, &[iov]).await })
    }
}
