//! Header: what stands at the start of a LUKS1 volume, as the "LUKS On-Disk Format Specification" 1.2.3 has it, and what
//! a passphrase makes of it. It owns the bounds on what a header may ask for in time and memory; it does no I/O.

use zeroize::Zeroizing;

use super::cipher::{Cipher, CipherSpec, Hash, SECTOR};
use crate::error::{OpenError, OpenResult};

/// The size of the header itself, in bytes.
pub(crate) const HEADER_BYTES: usize = 592;
/// Header and key material are never more than this.
pub(crate) const REGION_BYTES_MAX: u64 = 16 << 20;
/// How often one open hashes at most, over all key slots: a matter of seconds. A header may ask for any number, and
/// minutes would pass before the passphrase turns out to be wrong.
pub(crate) const ITERATIONS_MAX: u64 = 64 << 20;

const MAGIC: &[u8] = b"LUKS\xba\xbe";
const SLOTS: usize = 8;
const SLOTS_AT: usize = 208;
const SLOT_BYTES: usize = 48;
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_INACTIVE: u32 = 0x0000_dead;
/// How many pieces a key is split into (anti-forensic).
const STRIPES: u32 = 4000;
const DIGEST_BYTES: usize = 20;
/// The first key material of new volumes, and what all of it is aligned to, in sectors.
const MATERIAL_ALIGNMENT: u64 = 8;

/// A place for one passphrase.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    iterations: u32,
    salt: [u8; 32],
    /// In bytes, from the start of the header.
    material: u64,
    stripes: u32,
}

/// A header that was checked.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    spec: CipherSpec,
    hash: Hash,
    /// Where the data begins, in bytes. Without meaning inside qcow2.
    pub(crate) payload: u64,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    /// Those that hold a key.
    slots: Vec<Slot>,
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

/// A name that ends with a zero.
fn name(bytes: &[u8], at: usize) -> String {
    let bytes = array::<32>(bytes, at);
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

impl Header {
    /// Reads the first [`HEADER_BYTES`] of a volume.
    pub(crate) fn parse(bytes: &[u8]) -> OpenResult<Self> {
        if bytes.len() < HEADER_BYTES || !bytes.starts_with(MAGIC) {
            return Err(OpenError::new("it has no LUKS header"));
        }
        let version = u16::from_be_bytes(array(bytes, 6));
        if version != 1 {
            return Err(OpenError(format!("its version {version} of LUKS is not supported, only 1 is")));
        }
        let key_bytes = number(bytes, 108) as usize;
        let spec = CipherSpec::parse(&name(bytes, 8), &name(bytes, 40), key_bytes)?;
        let hash = Hash::parse(&name(bytes, 72))?;
        let digest_iterations = number(bytes, 164);
        let mut slots = Vec::new();
        let mut regions: Vec<(u64, u64)> = vec![(0, HEADER_BYTES as u64)];
        for index in 0..SLOTS {
            let at = SLOTS_AT + index * SLOT_BYTES;
            let bad = |why: &str| Err(OpenError(format!("its key slot {index} {why}")));
            match number(bytes, at) {
                SLOT_INACTIVE => continue,
                SLOT_ACTIVE => {}
                _ => return bad("is neither in use nor free: the header is damaged"),
            }
            let slot = Slot {
                iterations: number(bytes, at + 4),
                salt: array(bytes, at + 8),
                material: u64::from(number(bytes, at + 40)) * SECTOR as u64,
                stripes: number(bytes, at + 44),
            };
            if slot.stripes == 0 || slot.stripes > STRIPES || slot.iterations == 0 {
                return bad("has a number of stripes or iterations that is not supported");
            }
            let (start, end) = (slot.material, slot.material + slot.material_bytes(key_bytes) as u64);
            if end > REGION_BYTES_MAX || regions.iter().any(|(from, to)| start < *to && *from < end) {
                return bad("lies on something else, or too far away: the header is damaged");
            }
            regions.push((start, end));
            slots.push(slot);
        }
        if digest_iterations == 0 {
            return Err(OpenError::new("its digest has no iterations: the header is damaged"));
        }
        Ok(Self {
            spec,
            hash,
            payload: u64::from(number(bytes, 104)) * SECTOR as u64,
            digest: array(bytes, 112),
            digest_salt: array(bytes, 132),
            digest_iterations,
            slots,
        })
    }

    /// How many bytes from the start on hold keys.
    pub(crate) fn region_bytes(&self) -> u64 {
        let end = |slot: &Slot| slot.material + slot.material_bytes(self.spec.key_bytes()) as u64;
        self.slots.iter().map(end).max().unwrap_or(HEADER_BYTES as u64)
    }

    /// The cipher of the data, if the passphrase is that of some slot. `region` are the bytes from the start of the
    /// header on. Takes seconds; not on a thread that others wait for.
    ///
    /// # Errors
    /// No slot has that passphrase, or trying takes too long.
    pub(crate) fn unlock(&self, region: &[u8], passphrase: &[u8]) -> OpenResult<Cipher> {
        let key_bytes = self.spec.key_bytes();
        let mut left = ITERATIONS_MAX;
        for slot in &self.slots {
            // Each piece of the derived key as long as the hash is hashed for by itself.
            let pieces = key_bytes.div_ceil(self.hash.bytes()) as u64;
            let cost = u64::from(slot.iterations) * pieces + u64::from(self.digest_iterations);
            left = left.checked_sub(cost).ok_or_else(|| {
                OpenError(format!(
                    "trying its key slots takes more than {ITERATIONS_MAX} iterations, which is the limit"
                ))
            })?;
            let end = slot.material as usize + slot.material_bytes(key_bytes);
            let Some(material) = region.get(slot.material as usize..end) else {
                return Err(OpenError::new("its key material lies behind the end of the file"));
            };
            let derived = self.hash.derive(passphrase, &slot.salt, slot.iterations, key_bytes);
            let mut split = Zeroizing::new(material.to_vec());
            self.spec.with_key(&derived)?.decrypt(0, &mut split);
            let key = merge(self.hash, &split, key_bytes, slot.stripes);
            if *self.digest_of(&key) == self.digest {
                return self.spec.with_key(&key);
            }
        }
        Err(match self.slots.is_empty() {
            true => OpenError::new("all its key slots are empty: nothing opens it any more"),
            false => OpenError::new("the secret is that of none of its key slots"),
        })
    }

    fn digest_of(&self, key: &[u8]) -> Zeroizing<Vec<u8>> {
        self.hash.derive(key, &self.digest_salt, self.digest_iterations, DIGEST_BYTES)
    }
}

impl Slot {
    /// The size of its key material: whole sectors.
    fn material_bytes(&self, key_bytes: usize) -> usize {
        (key_bytes * self.stripes as usize).next_multiple_of(SECTOR)
    }
}

/// Mixes a piece of a split key, so that a bit that is lost is lost to all of it.
fn diffuse(hash: Hash, block: &mut [u8]) {
    for (number, part) in (0u32..).zip(block.chunks_mut(hash.bytes())) {
        let mixed = hash.digest(&[&number.to_be_bytes(), part]);
        let len = part.len();
        part.copy_from_slice(&mixed[..len]);
    }
}

fn xor(block: &mut [u8], with: &[u8]) {
    block.iter_mut().zip(with).for_each(|(byte, with)| *byte ^= with);
}

/// The key that was split.
fn merge(hash: Hash, split: &[u8], key_bytes: usize, stripes: u32) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    let mut pieces = split.chunks_exact(key_bytes).take(stripes as usize).peekable();
    while let Some(piece) = pieces.next() {
        xor(&mut key, piece);
        if pieces.peek().is_some() {
            diffuse(hash, &mut key);
        }
    }
    key
}

/// Splits a key; `random` holds all pieces but the last.
fn split(hash: Hash, key: &[u8], random: Zeroizing<Vec<u8>>) -> Zeroizing<Vec<u8>> {
    let mut mixed = Zeroizing::new(vec![0; key.len()]);
    let mut all = random;
    for piece in all.chunks_exact(key.len()) {
        xor(&mut mixed, piece);
        diffuse(hash, &mut mixed);
    }
    xor(&mut mixed, key);
    all.extend_from_slice(&mixed);
    all
}

/// What a new volume is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuksOptions {
    /// The cipher: aes-128, aes-192 or aes-256.
    pub cipher: String,
    /// The mode: xts or cbc.
    pub mode: String,
    /// What a sector's encryption begins with: plain, plain64 or essiv.
    pub iv: String,
    /// The hash of essiv.
    pub iv_hash: Option<String>,
    /// The hash of keys.
    pub hash: String,
    /// How long it takes to try a passphrase, in milliseconds on this machine.
    pub iter_time_ms: u64,
}

impl Default for LuksOptions {
    /// As QEMU makes them.
    fn default() -> Self {
        Self {
            cipher: "aes-256".to_owned(),
            mode: "xts".to_owned(),
            iv: "plain64".to_owned(),
            iv_hash: None,
            hash: "sha256".to_owned(),
            iter_time_ms: 2000,
        }
    }
}

/// How many iterations of a hash take that long here, from 1000 on.
fn iterations(hash: Hash, key_bytes: usize, milliseconds: u64) -> u32 {
    const TRIAL: u32 = 20_000;
    let start = std::time::Instant::now();
    hash.derive(b"trial", b"salt", TRIAL, key_bytes);
    let nanoseconds = (start.elapsed().as_nanos() as u64).max(1);
    let wanted = u64::from(TRIAL).saturating_mul(milliseconds).saturating_mul(1_000_000) / nanoseconds;
    let pieces = key_bytes.div_ceil(hash.bytes()) as u64;
    // All eight slots can be tried within the limit.
    u32::try_from(wanted.min(ITERATIONS_MAX / 9 / pieces)).unwrap_or(u32::MAX).max(1000)
}

/// The first bytes of a new volume, up to where its data begins: a new key, which the passphrase opens. Takes
/// [`LuksOptions::iter_time_ms`] and more.
///
/// # Errors
/// The options contradict each other, or the host has no random numbers.
pub fn new_volume(options: &LuksOptions, passphrase: &[u8]) -> OpenResult<Vec<u8>> {
    let (cipher, bits) = options.cipher.split_once('-').unwrap_or((&options.cipher, "256"));
    let single = bits.parse::<usize>().unwrap_or(0) / 8;
    let key_bytes = if options.mode == "xts" { single * 2 } else { single };
    let mode = match &options.iv_hash {
        Some(hash) => format!("{}-{}:{hash}", options.mode, options.iv),
        None if options.iv == "essiv" => format!("{}-essiv:sha256", options.mode),
        None => format!("{}-{}", options.mode, options.iv),
    };
    let spec = CipherSpec::parse(cipher, &mode, key_bytes)?;
    let hash = Hash::parse(&options.hash)?;
    let random = |bytes: usize| {
        let mut random = Zeroizing::new(vec![0; bytes]);
        crate::sys::fill_random(&mut random).map_err(|e| OpenError(format!("no random numbers: {e}")))?;
        OpenResult::Ok(random)
    };
    let key = random(key_bytes)?;
    let rounds = iterations(hash, key_bytes, options.iter_time_ms);
    let material_sectors =
        ((key_bytes * STRIPES as usize).div_ceil(SECTOR) as u64).next_multiple_of(MATERIAL_ALIGNMENT);
    let payload_sectors = MATERIAL_ALIGNMENT + material_sectors * SLOTS as u64;

    let mut volume = vec![0; payload_sectors as usize * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| volume[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, MAGIC);
    put(6, &1u16.to_be_bytes());
    put(8, cipher.as_bytes());
    put(40, mode.as_bytes());
    put(72, options.hash.as_bytes());
    put(104, &(payload_sectors as u32).to_be_bytes());
    put(108, &(key_bytes as u32).to_be_bytes());
    let digest_salt = random(32)?;
    let digest_iterations = (rounds / 8).max(1000);
    put(112, &hash.derive(&key, &digest_salt, digest_iterations, DIGEST_BYTES));
    put(132, &digest_salt);
    put(164, &digest_iterations.to_be_bytes());
    put(168, uuid(&random(16)?).as_bytes());
    for index in 0..SLOTS {
        let at = SLOTS_AT + index * SLOT_BYTES;
        let material = MATERIAL_ALIGNMENT + material_sectors * index as u64;
        put(at, &SLOT_INACTIVE.to_be_bytes());
        put(at + 40, &(material as u32).to_be_bytes());
        put(at + 44, &STRIPES.to_be_bytes());
    }
    let salt = random(32)?;
    put(SLOTS_AT, &SLOT_ACTIVE.to_be_bytes());
    put(SLOTS_AT + 4, &rounds.to_be_bytes());
    put(SLOTS_AT + 8, &salt);
    let derived = hash.derive(passphrase, &salt, rounds, key_bytes);
    let mut material = split(hash, &key, random(key_bytes * (STRIPES as usize - 1))?);
    material.resize((key_bytes * STRIPES as usize).next_multiple_of(SECTOR), 0);
    spec.with_key(&derived)?.encrypt(0, &mut material);
    put(MATERIAL_ALIGNMENT as usize * SECTOR, &material);
    Ok(volume)
}

/// A random one, version 4, as text.
fn uuid(random: &[u8]) -> String {
    let mut text = String::new();
    for (at, byte) in random.iter().enumerate() {
        let byte = match at {
            6 => byte & 0x0f | 0x40,
            8 => byte & 0x3f | 0x80,
            _ => *byte,
        };
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_volume_opens_with_its_passphrase_and_no_other() {
        for (cipher, mode, iv, hash) in [
            ("aes-256", "xts", "plain64", "sha256"),
            ("aes-128", "cbc", "essiv", "sha1"),
            ("aes-192", "xts", "plain", "sha512"),
        ] {
            let options = LuksOptions {
                cipher: cipher.to_owned(),
                mode: mode.to_owned(),
                iv: iv.to_owned(),
                hash: hash.to_owned(),
                iter_time_ms: 1,
                ..LuksOptions::default()
            };
            let volume = new_volume(&options, b"open").expect("the options agree");
            let header = Header::parse(&volume).expect("it is sound");
            assert_eq!(header.payload, volume.len() as u64);
            let first = header.unlock(&volume, b"open").expect("that is it");
            let second = header.unlock(&volume, b"open").expect("that is it");
            let (mut a, mut b) = (vec![1; 1024], vec![1; 1024]);
            first.encrypt(7, &mut a);
            second.encrypt(7, &mut b);
            assert!(a == b && a != [1; 1024]);
            let error = header.unlock(&volume, b"opem").err().expect("that is not it");
            assert!(error.0.contains("none of its key slots"), "{error}");
            // One bit of the key material is lost, and with it the key.
            let mut damaged = volume.clone();
            damaged[5000] ^= 1;
            assert!(header.unlock(&damaged, b"open").is_err());
        }
    }

    #[test]
    fn headers_that_ask_for_too_much_are_refused() {
        let options = LuksOptions { iter_time_ms: 1, ..LuksOptions::default() };
        let volume = new_volume(&options, b"open").expect("the options agree");
        let with = |at: usize, value: u32| {
            let mut volume = volume.clone();
            volume[at..at + 4].copy_from_slice(&value.to_be_bytes());
            Header::parse(&volume).and_then(|header| header.unlock(&volume, b"open")).err().map(|e| e.0)
        };
        assert_eq!(with(0, u32::from_be_bytes(*b"LUKS")), None);
        for (at, value, expected) in [
            (SLOTS_AT + 4, 400_000_000, "limit"),
            (164, u32::MAX, "limit"),
            (164, 0, "damaged"),
            (SLOTS_AT + 4, 0, "iterations"),
            (SLOTS_AT + 44, 1 << 30, "stripes"),
            (SLOTS_AT + 40, 0, "damaged"),
            (SLOTS_AT + 40, u32::MAX, "damaged"),
            (SLOTS_AT, 7, "damaged"),
            (SLOTS_AT, SLOT_INACTIVE, "empty"),
            (108, 1 << 31, "not supported"),
            (104, 1, ""),
        ] {
            let error = with(at, value).unwrap_or_default();
            assert!(error.contains(expected), "{at} {value}: {error}");
        }
    }
}
