//! Options as users write them, key=value or JSON. What is understood says the same when it is written as JSON and read
//! again, whatever the notation was.
#![no_main]

use blockport_block::options::parse_keyval;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for implied in [None, Some("driver")] {
        let Ok(options) = parse_keyval(text, implied) else { continue };
        let json = options.to_json();
        let written = json.to_string();
        let again = parse_keyval(&written, implied).unwrap_or_else(|error| panic!("{written}: {error}"));
        assert_eq!(again.to_json(), json, "{text:?} became {written}");
    }
});
