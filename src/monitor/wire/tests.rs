//! Tests of the wire: any split of a stream gives the same messages, and no stream grows without bound.

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// All that a stream holds, fed in pieces of the given lengths, over and over.
fn frames(stream: &[u8], lengths: &[usize]) -> Vec<Frame> {
    let mut framer = Framer::default();
    let mut found = Vec::new();
    let mut rest = stream;
    for length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at((*length).clamp(1, rest.len()));
        framer.push(piece);
        while let Some(frame) = framer.next() {
            found.push(frame);
        }
        rest = after;
    }
    found
}

fn whole(stream: &[u8]) -> Vec<Frame> {
    frames(stream, &[usize::MAX])
}

fn message(text: &str) -> Frame {
    Frame::Message(text.as_bytes().to_vec())
}

/// Whether something is a message, for streams where the wording of a complaint does not matter.
fn shape(frames: &[Frame]) -> Vec<Option<String>> {
    let text = |frame: &Frame| match frame {
        Frame::Message(message) => Some(String::from_utf8_lossy(message).into_owned()),
        Frame::Garbage(_) | Frame::TooLong => None,
    };
    frames.iter().map(text).collect()
}

#[test]
fn messages_need_nothing_between_them() {
    let stream = br#"{"a":1}{"b":"}{"} [1,{"c":'"]'}]
        "text" 42 true{}"#;
    let expected = [r#"{"a":1}"#, r#"{"b":"}{"}"#, r#"[1,{"c":'"]'}]"#, r#""text""#, "42", "true", "{}"].map(message);
    assert_eq!(whole(stream), expected);
}

#[test]
fn what_was_begun_is_dropped_by_a_byte_that_no_json_has_and_the_stream_goes_on() {
    // How many complaints come before the good message is what qemu-storage-daemon answers to the same bytes.
    for (garbage, complaints) in [
        (&b"\xff"[..], 1),
        (b"{\"execute\":\xff", 1),
        (b"{\"exec\n", 1),
        (b"{\"a\":\"\xff", 1),
        (b"}}", 2),
        (b": , ", 2),
        (b"{\"a\":\"\x01\"}", 2),
        (b"\0", 1),
        (b"\x80abc", 1),
        (b"# ", 1),
        (b"\xfe", 1),
    ] {
        let mut stream = garbage.to_vec();
        stream.extend_from_slice(br#"{"execute":"x"}"#);
        let found = shape(&whole(&stream));
        let mut expected = vec![None; complaints];
        expected.push(Some(r#"{"execute":"x"}"#.to_owned()));
        assert_eq!(found, expected, "{garbage:?}");
    }
}

#[test]
fn wrong_brackets_end_a_message() {
    assert_eq!(whole(br#"{]{"a":1}"#), ["{]", r#"{"a":1}"#].map(message));
    assert_eq!(whole(b"[}{}"), ["[}", "{}"].map(message));
}

#[test]
fn nesting_is_bounded() {
    let deepest = "[".repeat(100) + &"]".repeat(100);
    assert_eq!(whole(deepest.as_bytes()), [message(&deepest)]);
    let deeper = "[".repeat(101);
    assert_eq!(whole(deeper.as_bytes()), [Frame::Garbage("it nests too deep")]);
}

#[test]
fn a_message_without_end_takes_bounded_memory() {
    for (begin, more) in [(&b"{\"a\":\""[..], b'x'), (b"[", b' '), (b"", b'1')] {
        let mut framer = Framer::default();
        framer.push(begin);
        let piece = vec![more; 4096];
        let mut fed = 0;
        let frame = loop {
            framer.push(&piece);
            fed += piece.len();
            assert!(framer.held() <= MESSAGE_BYTES_MAX + 2 * piece.len(), "{} bytes are held", framer.held());
            if let Some(frame) = framer.next() {
                break frame;
            }
            assert!(fed < 100 << 20, "100 MB were swallowed");
        };
        assert_eq!(frame, Frame::TooLong);
    }
}

#[test]
fn blanks_without_end_take_no_memory() {
    let mut framer = Framer::default();
    for byte in [b' ', b'\n'] {
        framer.push(&[byte; 10_000]);
        assert_eq!((framer.next(), framer.held()), (None, 0));
    }
    framer.push(b"\xff");
    assert!(framer.next().is_some());
    framer.push(&[b'x'; 10_000]);
    assert_eq!((framer.next(), framer.held()), (None, 0));
}

#[test]
fn answers_are_ascii_on_one_line_or_pretty() {
    let value = json!({"a": [1, "é\u{7f}😀\n\""], "b": {}});
    let mut out = Vec::new();
    write(&mut out, &value, false);
    let expected = "{\"a\": [1, \"\\u00e9\\u007f\\ud83d\\ude00\\n\\\"\"], \"b\": {}}\r\n";
    assert_eq!(String::from_utf8(out.clone()).expect("ASCII"), expected);
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&out).expect("JSON"), value);
    out.clear();
    write(&mut out, &json!({"a": [1]}), true);
    assert_eq!(out, b"{\n    \"a\": [\n        1\n    ]\n}\r\n");
}

/// JSON values as clients send them, nested a little.
fn values() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|value| json!(value)),
        any::<i64>().prop_map(|value| json!(value)),
        ".{0,12}".prop_map(|value| json!(value)),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|list| json!(list)),
            prop::collection::btree_map(".{0,6}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

proptest! {
    #[test]
    fn any_split_of_a_stream_gives_the_same_messages(
        list in prop::collection::vec(values(), 1..6),
        lengths in prop::collection::vec(1_usize..40, 1..8),
    ) {
        let texts: Vec<String> = list.iter().map(ToString::to_string).collect();
        let stream = texts.join("\n") + "\n";
        let expected: Vec<Frame> = texts.iter().map(|text| message(text)).collect();
        prop_assert_eq!(&whole(stream.as_bytes()), &expected);
        prop_assert_eq!(&frames(stream.as_bytes(), &lengths), &expected);
    }

    #[test]
    fn any_split_of_garbage_gives_the_same_too(
        stream in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"{}[]\"'\\:, \n1"[..])], 0..200),
        lengths in prop::collection::vec(1_usize..40, 1..8),
    ) {
        prop_assert_eq!(whole(&stream), frames(&stream, &lengths));
    }

    #[test]
    fn after_a_reset_and_an_end_of_line_the_stream_is_in_step(
        garbage in prop::collection::vec(any::<u8>(), 0..200),
        lengths in prop::collection::vec(1_usize..40, 1..8),
    ) {
        let mut stream = garbage;
        stream.extend_from_slice(b"\xff\n{\"execute\": \"x\"}");
        prop_assert_eq!(frames(&stream, &lengths).pop(), Some(message("{\"execute\": \"x\"}")));
    }
}
