//! What a client of the monitor sends, in pieces of any size. Where one message ends does not depend on how the bytes
//! were cut, and what is taken for a message parses as JSON or is reported, never both lost.
#![no_main]

#[allow(dead_code)]
#[path = "../../../src/monitor/wire.rs"]
mod wire;

use libfuzzer_sys::fuzz_target;

fn frames(data: &[u8], mut cut: impl FnMut() -> usize) -> Vec<String> {
    let mut framer = wire::Framer::default();
    let (mut found, mut rest) = (Vec::new(), data);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(cut().clamp(1, rest.len()));
        rest = after;
        framer.push(piece);
        while let Some(frame) = framer.next() {
            found.push(format!("{frame:?}"));
            assert!(found.len() <= 2 * data.len() + 2, "more messages than bytes");
        }
    }
    found
}

fuzz_target!(|data: &[u8]| {
    let Some((seed, data)) = data.split_first() else { return };
    let mut state = u32::from(*seed);
    let pieces = frames(data, || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 28) as usize
    });
    assert_eq!(frames(data, || usize::MAX), pieces);
    assert_eq!(frames(data, || 1), pieces);
});
