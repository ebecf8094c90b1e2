//! Data: the one place where a guest's bytes are read from the image or written to it. It owns what lies between: the
//! cipher of an encrypted image, which works on whole sectors by where they lie in the file.

use std::sync::Arc;

use super::channel::Channel;
use crate::driver::{BlockFuture, InFlight, WriteFlags};
use crate::drivers::luks::Cipher;
use crate::iovec::{self, IoVec};
use crate::node::SECTOR;

/// Encrypts what a guest writes.
pub trait PayloadCipher: Send + Sync {
    /// Encrypts `data`, whole sectors of 512 bytes, in place. `offset` is where they lie in the file, in bytes, a multiple
    /// of 512.
    fn encrypt(&self, offset: u64, data: &mut [u8]);

    /// The reverse.
    fn decrypt(&self, offset: u64, data: &mut [u8]);
}

/// LUKS counts sectors from the start of the file.
impl PayloadCipher for Cipher {
    fn encrypt(&self, offset: u64, data: &mut [u8]) {
        Self::encrypt(self, offset / SECTOR, data);
    }

    fn decrypt(&self, offset: u64, data: &mut [u8]) {
        Self::decrypt(self, offset / SECTOR, data);
    }
}

impl Channel {
    /// Reads guest data from `host` on. The pin is held until it has ended.
    pub(super) fn read_data(&self, host: u64, iov: &[IoVec], pin: Arc<InFlight>) -> BlockFuture {
        let Some(cipher) = self.image.cipher.clone() else { return self.data.preadv(host, iov).holding(pin) };
        let (data, iov) = (self.data.clone(), iov.to_vec());
        BlockFuture::boxed(async move {
            data.preadv(host, &iov).await?;
            let mut bytes = vec![0; iovec::total_len(&iov) as usize];
            iovec::copy_to(&iov, &mut bytes);
            cipher.decrypt(host, &mut bytes);
            iovec::fill_from(&iov, &bytes);
            drop(pin);
            Ok(())
        })
    }

    /// Writes guest data to `host`. The pin, if any, is held until it has ended.
    pub(super) fn write_data(
        &self,
        host: u64,
        iov: &[IoVec],
        flags: WriteFlags,
        pin: Option<Arc<InFlight>>,
    ) -> BlockFuture {
        let Some(cipher) = self.image.cipher.clone() else {
            let future = self.data.pwritev(host, iov, flags);
            return match pin {
                Some(pin) => future.holding(pin),
                None => future,
            };
        };
        let (data, iov) = (self.data.clone(), iov.to_vec());
        BlockFuture::boxed(async move {
            let mut bytes = vec![0; iovec::total_len(&iov) as usize];
            iovec::copy_to(&iov, &mut bytes);
            cipher.encrypt(host, &mut bytes);
            let mut buffer = iovec::AlignedBuffer::new(bytes.len(), 4096);
            buffer.fill_from(&bytes);
            let result = data.pwritev(host, &[buffer.iov()], flags).await;
            drop(pin);
            result
        })
    }
}
