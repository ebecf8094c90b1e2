//! Cipher: AES in the modes that disks are encrypted with, sector by sector. It owns the names of ciphers, modes and
//! hashes, as LUKS spells them, and how a sector's number becomes what its encryption begins with; keys it is given.

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Aes192, Aes256, Block};
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use zeroize::Zeroizing;

use super::xts;
use crate::error::{OpenError, OpenResult};

/// The unit of encryption, in bytes.
pub(crate) const SECTOR: usize = 512;

/// A hash, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl Hash {
    const NAMES: [(&'static str, Self); 5] = [
        ("sha1", Self::Sha1),
        ("sha224", Self::Sha224),
        ("sha256", Self::Sha256),
        ("sha384", Self::Sha384),
        ("sha512", Self::Sha512),
    ];

    pub(super) fn parse(name: &str) -> OpenResult<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, hash)| *hash).ok_or_else(|| OpenError(format!("its hash {name:?} is not supported")))
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    pub(super) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn digest<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
            let mut state = D::new();
            parts.iter().for_each(|part| state.update(part));
            Zeroizing::new(state.finalize().to_vec())
        }
        match self {
            Self::Sha1 => digest::<Sha1>(parts),
            Self::Sha224 => digest::<Sha224>(parts),
            Self::Sha256 => digest::<Sha256>(parts),
            Self::Sha384 => digest::<Sha384>(parts),
            Self::Sha512 => digest::<Sha512>(parts),
        }
    }

    /// PBKDF2 with the HMAC of this hash.
    pub(super) fn derive(self, password: &[u8], salt: &[u8], iterations: u32, bytes: usize) -> Zeroizing<Vec<u8>> {
        let mut out = Zeroizing::new(vec![0; bytes]);
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(password, salt, iterations, &mut out),
            Self::Sha224 => pbkdf2::pbkdf2_hmac::<Sha224>(password, salt, iterations, &mut out),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(password, salt, iterations, &mut out),
            Self::Sha384 => pbkdf2::pbkdf2_hmac::<Sha384>(password, salt, iterations, &mut out),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(password, salt, iterations, &mut out),
        }
        out
    }
}

/// What a sector's encryption begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Iv {
    /// Its number, 32 bits of it.
    Plain,
    /// Its number.
    Plain64,
    /// Its number, encrypted by the hash of the key.
    Essiv(Hash),
}

/// How blocks are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Xts,
    Cbc,
}

/// What a header says of its cipher, as far as that is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CipherSpec {
    mode: Mode,
    iv: Iv,
    key_bytes: usize,
}

impl CipherSpec {
    /// From a header's fields, such as "aes", "xts-plain64" and 64.
    pub(super) fn parse(cipher: &str, mode: &str, key_bytes: usize) -> OpenResult<Self> {
        let refuse = || OpenError(format!("its cipher {cipher}-{mode} with {key_bytes} bytes of key is not supported"));
        let (mode, iv) = mode.split_once('-').ok_or_else(refuse)?;
        let (mode, sizes) = match mode {
            "xts" => (Mode::Xts, [32, 48, 64]),
            "cbc" => (Mode::Cbc, [16, 24, 32]),
            _ => return Err(refuse()),
        };
        let iv = match iv.split_once(':') {
            None if iv == "plain" => Iv::Plain,
            None if iv == "plain64" => Iv::Plain64,
            Some(("essiv", hash)) => Iv::Essiv(Hash::parse(hash)?),
            _ => return Err(refuse()),
        };
        if cipher != "aes" || !sizes.contains(&key_bytes) {
            return Err(refuse());
        }
        Ok(Self { mode, iv, key_bytes })
    }

    pub(super) fn key_bytes(self) -> usize {
        self.key_bytes
    }

    /// The cipher with a key of `key_bytes` bytes.
    pub(super) fn with_key(self, key: &[u8]) -> OpenResult<Cipher> {
        let wrong = || OpenError::new("the key has another length than the cipher's");
        let essiv = match self.iv {
            Iv::Essiv(hash) => Some(Aes::new(&hash.digest(&[key])).ok_or_else(wrong)?),
            Iv::Plain | Iv::Plain64 => None,
        };
        let (data, tweak) = match self.mode {
            Mode::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                (Aes::new(data), Some(Aes::new(tweak).ok_or_else(wrong)?))
            }
            Mode::Cbc => (Aes::new(key), None),
        };
        Ok(Cipher { data: data.ok_or_else(wrong)?, tweak, iv: self.iv, essiv })
    }
}

/// AES with a key of any of its lengths. The keys are wiped when it is dropped.
enum Aes {
    Aes128(Box<Aes128>),
    Aes192(Box<Aes192>),
    Aes256(Box<Aes256>),
}

impl Aes {
    fn new(key: &[u8]) -> Option<Self> {
        Some(match key.len() {
            16 => Self::Aes128(Box::new(Aes128::new_from_slice(key).ok()?)),
            24 => Self::Aes192(Box::new(Aes192::new_from_slice(key).ok()?)),
            32 => Self::Aes256(Box::new(Aes256::new_from_slice(key).ok()?)),
            _ => return None,
        })
    }

    fn encrypt_block(&self, block: &mut Block) {
        match self {
            Self::Aes128(aes) => aes.encrypt_block(block),
            Self::Aes192(aes) => aes.encrypt_block(block),
            Self::Aes256(aes) => aes.encrypt_block(block),
        }
    }

    fn decrypt_blocks(&self, blocks: &mut [Block]) {
        match self {
            Self::Aes128(aes) => aes.decrypt_blocks(blocks),
            Self::Aes192(aes) => aes.decrypt_blocks(blocks),
            Self::Aes256(aes) => aes.decrypt_blocks(blocks),
        }
    }
}

/// A cipher with its key.
pub(crate) struct Cipher {
    data: Aes,
    /// XTS has two keys; CBC has one.
    tweak: Option<Aes>,
    iv: Iv,
    essiv: Option<Aes>,
}

impl Cipher {
    fn iv(&self, sector: u64) -> [u8; 16] {
        let number = match self.iv {
            Iv::Plain => sector & u64::from(u32::MAX),
            Iv::Plain64 | Iv::Essiv(_) => sector,
        };
        let iv = u128::from(number).to_le_bytes();
        match &self.essiv {
            Some(aes) => {
                let mut block = iv.into();
                aes.encrypt_block(&mut block);
                block.into()
            }
            None => iv,
        }
    }

    /// Encrypts whole sectors in place, the first of which has the number `first`.
    pub(crate) fn encrypt(&self, first: u64, data: &mut [u8]) {
        let iv = |number| self.iv(first.wrapping_add(number));
        match (&self.data, &self.tweak) {
            (Aes::Aes128(aes), Some(Aes::Aes128(tweak))) => xts::encrypt(&**aes, &**tweak, data, iv),
            (Aes::Aes192(aes), Some(Aes::Aes192(tweak))) => xts::encrypt(&**aes, &**tweak, data, iv),
            (Aes::Aes256(aes), Some(Aes::Aes256(tweak))) => xts::encrypt(&**aes, &**tweak, data, iv),
            _ => self.encrypt_chained(data, iv),
        }
    }

    /// The reverse.
    pub(crate) fn decrypt(&self, first: u64, data: &mut [u8]) {
        let iv = |number| self.iv(first.wrapping_add(number));
        match (&self.data, &self.tweak) {
            (Aes::Aes128(aes), Some(Aes::Aes128(tweak))) => xts::decrypt(&**aes, &**tweak, data, iv),
            (Aes::Aes192(aes), Some(Aes::Aes192(tweak))) => xts::decrypt(&**aes, &**tweak, data, iv),
            (Aes::Aes256(aes), Some(Aes::Aes256(tweak))) => xts::decrypt(&**aes, &**tweak, data, iv),
            _ => self.decrypt_chained(data, iv),
        }
    }

    /// CBC: each block with the one before.
    fn encrypt_chained(&self, data: &mut [u8], iv: impl Fn(u64) -> [u8; 16]) {
        for (number, sector) in (0..).zip(data.chunks_exact_mut(SECTOR)) {
            let (blocks, _) = Block::slice_as_chunks_mut(sector);
            let mut before: Block = iv(number).into();
            for block in blocks {
                xor(block, &before);
                self.data.encrypt_block(block);
                before = *block;
            }
        }
    }

    fn decrypt_chained(&self, data: &mut [u8], iv: impl Fn(u64) -> [u8; 16]) {
        for (number, sector) in (0..).zip(data.chunks_exact_mut(SECTOR)) {
            let (blocks, _) = Block::slice_as_chunks_mut(sector);
            let mut before: Block = iv(number).into();
            let mut encrypted = [Block::default(); SECTOR / 16];
            encrypted.copy_from_slice(blocks);
            self.data.decrypt_blocks(blocks);
            for (block, encrypted) in blocks.iter_mut().zip(encrypted) {
                xor(block, &before);
                before = encrypted;
            }
        }
    }
}

fn xor(block: &mut Block, with: &Block) {
    block.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [&str; 6] =
        ["xts-plain64", "xts-plain", "xts-essiv:sha256", "cbc-essiv:sha256", "cbc-plain64", "cbc-plain"];

    #[test]
    fn what_is_encrypted_is_decrypted_sector_by_sector() {
        let key: Vec<u8> = (0..64).collect();
        for mode in MODES {
            for bytes in [16, 24, 32, 48, 64] {
                let Ok(spec) = CipherSpec::parse("aes", mode, bytes) else { continue };
                let cipher = spec.with_key(&key[..bytes]).expect("its length fits");
                let plain: Vec<u8> = (0..SECTOR * 19).map(|at| (at * 7 / 3) as u8).collect();
                let mut data = plain.clone();
                cipher.encrypt(5, &mut data);
                // One sector by itself is the same.
                let mut one = plain[SECTOR * 11..SECTOR * 12].to_vec();
                cipher.encrypt(16, &mut one);
                assert!(data[SECTOR * 11..SECTOR * 12] == one, "{mode} {bytes}");
                cipher.decrypt(5, &mut data);
                assert!(data == plain, "{mode} {bytes}");
            }
        }
    }

    /// IEEE 1619, vector 10: the first 16 bytes of 512, and the last.
    #[test]
    fn a_vector_of_the_standard() {
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len() / 2).map(|at| u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).expect("digits")).collect()
        };
        let key = hex(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592"
        ));
        let cipher = CipherSpec::parse("aes", "xts-plain64", 64).and_then(|spec| spec.with_key(&key)).expect("sound");
        let mut data: Vec<u8> = (0..512).map(|at| at as u8).collect();
        cipher.encrypt(0xff, &mut data);
        assert_eq!(data[..16], hex("1c3b3a102f770386e4836c99e370cf9b")[..]);
        assert_eq!(data[496..], hex("c4f36ffda9fcea70b9c6e693e148c151")[..]);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (cipher, mode, bytes) in [
            ("serpent", "xts-plain64", 64),
            ("aes", "ecb", 32),
            ("aes", "xts-plain64", 16),
            ("aes", "cbc-plain64be", 32),
            ("aes", "cbc-essiv:md5", 32),
        ] {
            let error = CipherSpec::parse(cipher, mode, bytes).expect_err("not supported");
            assert!(error.0.contains("not supported"), "{error}");
        }
    }
}
