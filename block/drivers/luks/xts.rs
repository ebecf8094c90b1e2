//! XTS over AES, as IEEE 1619 has it, for many sectors of 512 bytes at once. It owns the arithmetic of the tweaks, which
//! would take longer than the cipher if it were done block by block; the cipher itself is the `aes` crate's.
#![allow(unsafe_code)] // One call of a function that is compiled for CPUs with AVX2, once it is known that this is one.

use aes::Block;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt};

/// Blocks of a sector.
const BLOCKS: usize = 32;
/// How many sectors are worked on together.
const SECTORS: usize = 8;
/// How many neighbouring blocks have their tweaks worked out at once.
const LANES: usize = 8;

type Tweaks = [[u64; 2]; BLOCKS * SECTORS];

/// The tweaks of whole sectors, whose first ones are given: each is the one before times x.
#[inline(always)]
fn tweaks_of(starts: &[Block], tweaks: &mut Tweaks) {
    for (start, out) in starts.iter().zip(tweaks.chunks_exact_mut(BLOCKS)) {
        let mut tweak = u128::from_le_bytes((*start).into());
        let (mut low, mut high) = ([0u64; LANES], [0u64; LANES]);
        for lane in 0..LANES {
            (low[lane], high[lane]) = (tweak as u64, (tweak >> 64) as u64);
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
        }
        for group in out.chunks_exact_mut(LANES) {
            for lane in 0..LANES {
                group[lane] = [low[lane], high[lane]];
                // Times x to the power of 8: what is shifted out comes back times x^7 + x^2 + x + 1.
                let out = high[lane] >> 56;
                high[lane] = high[lane] << 8 | low[lane] >> 56;
                low[lane] = low[lane] << 8 ^ out ^ out << 1 ^ out << 2 ^ out << 7;
            }
        }
    }
}

#[inline(always)]
fn whiten(blocks: &mut [Block], tweaks: &Tweaks) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        let (halves, _) = block.as_chunks_mut::<8>();
        for (half, tweak) in halves.iter_mut().zip(tweak) {
            *half = (u64::from_le_bytes(*half) ^ tweak).to_le_bytes();
        }
    }
}

#[inline(always)]
fn crypt(starts: &[Block], blocks: &mut [Block], work: impl FnOnce(&mut [Block])) {
    let mut tweaks = [[0; 2]; BLOCKS * SECTORS];
    tweaks_of(starts, &mut tweaks);
    whiten(blocks, &tweaks);
    work(blocks);
    whiten(blocks, &tweaks);
}

/// The same, compiled for a CPU that has wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn crypt_wide(starts: &[Block], blocks: &mut [Block], work: impl FnOnce(&mut [Block])) {
    crypt(starts, blocks, work);
}

fn crypt_fast(starts: &[Block], blocks: &mut [Block], work: impl FnOnce(&mut [Block])) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2, which is all that the function asks for.
        return unsafe { crypt_wide(starts, blocks, work) };
    }
    crypt(starts, blocks, work);
}

/// Works on whole sectors: what is less than one at the end of `data` is left as it is. `iv` gives the tweak of a sector
/// before it is encrypted, by its number from 0.
fn each_batch<T: BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16>>(
    tweak: &T,
    data: &mut [u8],
    iv: impl Fn(u64) -> [u8; 16],
    work: impl Fn(&mut [Block]),
) {
    let mut number = 0;
    for batch in data.chunks_mut(512 * SECTORS) {
        let sectors = batch.len() / 512;
        let mut starts = [Block::default(); SECTORS];
        for start in starts.iter_mut().take(sectors) {
            *start = iv(number).into();
            number += 1;
        }
        let starts = &mut starts[..sectors];
        tweak.encrypt_blocks(starts);
        let (blocks, _) = Block::slice_as_chunks_mut(&mut batch[..sectors * 512]);
        crypt_fast(starts, blocks, &work);
    }
}

/// Encrypts whole sectors with the key of `data_cipher`.
pub(super) fn encrypt<T>(data_cipher: &T, tweak: &T, data: &mut [u8], iv: impl Fn(u64) -> [u8; 16])
where
    T: BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16>,
{
    each_batch(tweak, data, iv, |blocks| data_cipher.encrypt_blocks(blocks));
}

/// The reverse.
pub(super) fn decrypt<T>(data_cipher: &T, tweak: &T, data: &mut [u8], iv: impl Fn(u64) -> [u8; 16])
where
    T: BlockCipherEncrypt<BlockSize = aes::cipher::consts::U16> + BlockCipherDecrypt,
{
    each_batch(tweak, data, iv, |blocks| data_cipher.decrypt_blocks(blocks));
}
