//! The format `luks`: a volume whose data is encrypted, with a header that holds its key, encrypted by passphrases
//! (LUKS1, as QEMU and cryptsetup have it). This file owns the options and the control verbs; `header.rs` makes a key of
//! a secret, `cipher.rs` and `xts.rs` use it, `channel.rs` carries data.

mod channel;
mod cipher;
mod header;
mod xts;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use self::channel::{Channel, VolumeChannel};
pub(crate) use self::cipher::Cipher;
pub(crate) use self::header::REGION_BYTES_MAX;
use self::header::{HEADER_BYTES, Header};
pub use self::header::{LuksOptions, new_volume};
use super::own_loop::on_own_loop;
use super::{DriverKind, DriverRow};
use crate::aio::AioContext;
use crate::child::{Child, ChildChannel};
use crate::driver::{BlockDriver, IoChannel, WriteFlags};
use crate::error::{OpenError, OpenResult};
use crate::graph::OpenContext;
use crate::iovec::AlignedBuffer;
use crate::limits::BlockLimits;
use crate::node::SECTOR;
use crate::options::Options;
use crate::permissions::Permissions;

pub(super) const ROW: DriverRow = DriverRow {
    name: "luks",
    kind: DriverKind::Format,
    summary: "an encrypted volume (LUKS1)",
    options: &[
        ("file", "the node with the volume"),
        ("key-secret", "the id of the object of type secret that holds the passphrase"),
    ],
    open,
};

struct Luks {
    file: [Arc<Child>; 1],
    cipher: Arc<Cipher>,
    /// Where the data begins in the file.
    payload: u64,
    length: AtomicU64,
}

fn open(options: &mut Options, context: &OpenContext<'_>) -> OpenResult<Box<dyn BlockDriver>> {
    let key_secret = options.require_str("key-secret").map_err(OpenError::new)?;
    options.take_unsupported(&["header"]).map_err(OpenError::new)?;
    let secret = context.secret(options, "key-secret", &key_secret)?;
    let file = context.child(options, "file")?;
    let named = |e: OpenError| match file.node().file_name() {
        Some(path) => e.context(format_args!("LUKS volume \"{path}\"")),
        None => e.context(format_args!("node \"{}\"", context.node.name)),
    };
    let opened = on_own_loop("luks-control", |context| {
        let channel = file.channel(context)?;
        context.run_until(async move { unlock(&channel, 0, channel.length(), secret.bytes()).await })
    });
    let (cipher, payload) = opened.map_err(named)?;
    let there = file.node().length();
    if payload > there {
        return Err(named(OpenError(format!(
            "its data begins at {payload}, behind the end of the file ({there} bytes)"
        ))));
    }
    let length = AtomicU64::new(there - payload);
    Ok(Box::new(Luks { file: [file], cipher: Arc::new(cipher), payload, length }))
}

/// Reads the header that begins at `start` and is at most `bytes` long, with all that belongs to it, and has `passphrase`
/// open it. Returns the cipher, and where the header says that the data begins.
///
/// # Errors
/// The header is damaged or not supported, or does not know the passphrase.
pub(crate) async fn unlock(
    file: &Rc<ChildChannel>,
    start: u64,
    bytes: u64,
    passphrase: &[u8],
) -> OpenResult<(Cipher, u64)> {
    let read = async |bytes: u64| {
        let buffer = AlignedBuffer::new(bytes as usize, 4096);
        let read = file.preadv(start, &[buffer.iov()]).await;
        read.map(|()| buffer.to_vec()).map_err(|e| OpenError(format!("the LUKS header cannot be read: {e}")))
    };
    let sectors = |bytes: u64| bytes.next_multiple_of(SECTOR);
    if sectors(HEADER_BYTES as u64) > bytes {
        return Err(OpenError::new("it is too short for a LUKS header"));
    }
    let header = Header::parse(&read(sectors(HEADER_BYTES as u64)).await?)?;
    let region_bytes = sectors(header.region_bytes());
    if region_bytes > bytes.min(REGION_BYTES_MAX) {
        return Err(OpenError::new("its key material lies behind the end of the file"));
    }
    let region = read(region_bytes).await?;
    Ok((header.unlock(&region, passphrase)?, header.payload))
}

impl Luks {
    fn file(&self) -> &Child {
        &self.file[0]
    }

    /// Writes zeroes, encrypted, where a volume has grown.
    fn write_zeroes(&self, from: u64, to: u64) -> OpenResult {
        let (cipher, payload) = (&self.cipher, self.payload);
        on_own_loop("luks-control", |context| {
            let channel = Channel::new(cipher, self.file().channel(context)?, payload);
            context.run_until(async move {
                let zeroes = AlignedBuffer::new(channel::TRANSFER_MAX as usize, 4096);
                let mut at = from;
                while at < to {
                    let part = zeroes.iov().part(0, (to - at).min(zeroes.len() as u64) as usize);
                    let written = channel.write(at, &[part], WriteFlags::default()).await;
                    written.map_err(|e| OpenError(format!("zeroes cannot be written: {e}")))?;
                    at += part.len() as u64;
                }
                Ok(())
            })
        })
    }
}

impl BlockDriver for Luks {
    fn limits(&self) -> BlockLimits {
        let file = self.file().node();
        let limits = file.limits();
        BlockLimits {
            read_only: file.is_read_only(),
            // What the file asks for beyond a sector is its own edge's business.
            request_alignment: SECTOR as u32,
            max_transfer: channel::TRANSFER_MAX,
            optimal_transfer: limits.optimal_transfer,
            physical_block_size: limits.physical_block_size,
            ..BlockLimits::default()
        }
    }

    fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.file
    }

    fn child_permissions(&self, own: Permissions) -> Permissions {
        own
    }

    fn set_permissions(&self, _: Permissions) -> OpenResult {
        Ok(())
    }

    fn resize(&self, bytes: u64) -> OpenResult {
        let bytes = bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes);
        let Some(whole) = self.payload.checked_add(bytes) else {
            return Err(OpenError(format!("{bytes} bytes are more than a volume can have")));
        };
        let old = self.length();
        self.file().node().resize(whole)?;
        // Whatever the file has there now, decrypted it would be noise.
        if bytes > old
            && let Err(error) = self.write_zeroes(old, bytes)
        {
            self.file().node().resize(self.payload + old)?;
            return Err(error);
        }
        self.length.store(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn activate(&self) -> OpenResult {
        Ok(())
    }

    fn inactivate(&self) -> OpenResult {
        Ok(())
    }

    fn drained_begin(&self) {}

    fn drained_end(&self) {}

    fn attach(&self, context: &AioContext) -> OpenResult<Rc<dyn IoChannel>> {
        let channel = Channel::new(&self.cipher, self.file().channel(context)?, self.payload);
        Ok(Rc::new(VolumeChannel(channel)))
    }
}
