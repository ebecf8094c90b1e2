//! Tests of the option tree.

use serde_json::json;

use super::*;

fn parse(text: &str) -> Options {
    parse_keyval(text, Some("driver")).expect(text)
}

#[test]
fn takers_consume_and_convert() {
    let mut options = parse("raw,read-only=on,cache.direct=off,offset=0x200,size=1.5K,locking=auto,n=010");
    assert_eq!(options.take_str("driver").unwrap().as_deref(), Some("raw"));
    assert_eq!(options.take_str("driver").unwrap(), None);
    assert_eq!(options.take_bool("read-only").unwrap(), Some(true));
    assert_eq!(options.take_bool("cache.direct").unwrap(), Some(false));
    assert_eq!(options.take_bool("cache.no-flush").unwrap(), None);
    assert_eq!(options.take_u64("offset").unwrap(), Some(512));
    assert_eq!(options.take_size("size").unwrap(), Some(1536));
    assert_eq!(options.take_u64("n").unwrap(), Some(8));
    assert_eq!(options.take_enum("locking", &[("auto", 1), ("on", 2)]).unwrap(), Some(1));
    options.finish().unwrap();
}

#[test]
fn takers_consume_json_of_their_own_type_only() {
    let text = r#"{"s": "x", "b": true, "n": 7, "z": 4096, "e": "on", "c": {"d": false}, "empty": {}}"#;
    let mut options = parse(text);
    assert_eq!(options.take_str("s").unwrap().as_deref(), Some("x"));
    assert_eq!(options.take_bool("b").unwrap(), Some(true));
    assert_eq!(options.take_u64("n").unwrap(), Some(7));
    assert_eq!(options.take_size("z").unwrap(), Some(4096));
    assert_eq!(options.take_enum("e", &[("on", ())]).unwrap(), Some(()));
    assert_eq!(options.take_bool("c.d").unwrap(), Some(false));
    assert_eq!(options.take_bool("empty.x").unwrap(), None);
    options.finish().unwrap();

    let refuse = |json: serde_json::Value, take: fn(&mut Options) -> Option<OptionsError>| {
        let mut options = Options::from_json(json!({ "x": json })).unwrap();
        take(&mut options).expect("refused").to_string()
    };
    let bool_of = |o: &mut Options| o.take_bool("x").err();
    let u64_of = |o: &mut Options| o.take_u64("x").err();
    let size_of = |o: &mut Options| o.take_size("x").err();
    let str_of = |o: &mut Options| o.take_str("x").err();
    assert_eq!(refuse(json!("on"), bool_of), r#"option "x" must be true or false (without quotes in JSON), not "on""#);
    assert_eq!(refuse(json!(1.5), u64_of), r#"option "x" must be a whole number from 0, not "1.5""#);
    assert_eq!(refuse(json!(-1), u64_of), r#"option "x" must be a whole number from 0, not "-1""#);
    assert!(refuse(json!("1"), u64_of).contains("without quotes"));
    assert!(refuse(json!("1k"), size_of).contains("without quotes"));
    assert!(refuse(json!(1u64 << 63), size_of).contains("below 2^63"));
    assert_eq!(refuse(json!([]), str_of), r#"option "x" must be a string, not "a list""#);
    assert_eq!(refuse(json!({}), str_of), r#"option "x" must be a string, not "a group of options""#);
}

#[test]
fn booleans() {
    for (text, value) in [
        ("on", Some(true)),
        ("yes", Some(true)),
        ("true", Some(true)),
        ("y", Some(true)),
        ("off", Some(false)),
        ("no", Some(false)),
        ("false", Some(false)),
        ("n", Some(false)),
        ("", None),
        ("On", None),
        ("1", None),
    ] {
        assert_eq!(parse(&format!("b={text}")).take_bool("b").ok().flatten(), value, "{text}");
    }
}

#[test]
fn errors_name_subject_path_value_and_expectation() {
    let options =
        || parse("raw,node-name=disk0,file.driver=file,file.locking=maybe").with_subject(r#"blockdev "disk0""#);
    let mut parent = options();
    let ChildRef::Inline(mut file) = parent.require_child("file").unwrap() else { panic!("inline") };
    let locking = file.take_enum("locking", &[("auto", 0), ("on", 1), ("off", 2)]).unwrap_err();
    assert_eq!(
        locking.to_string(),
        r#"blockdev "disk0": option "file.locking" must be one of auto, on, off, not "maybe""#
    );
    assert_eq!(locking.path(), "file.locking");
    assert_eq!(
        file.require_str("filename").unwrap_err().to_string(),
        r#"blockdev "disk0": option "file.filename" is missing"#
    );
    assert_eq!(
        options().take_unsupported(&["aio", "file.driver"]).unwrap_err().to_string(),
        r#"blockdev "disk0": option "file.driver" is not supported yet"#
    );
    assert_eq!(
        options().take_bool("node-name.x").unwrap_err().to_string(),
        r#"blockdev "disk0": option "node-name" must be a group of options such as "node-name.x", not "disk0""#
    );
    assert_eq!(
        options().take_u64_in("file.driver", 1..=2).unwrap_err().to_string(),
        r#"blockdev "disk0": option "file.driver" must be a whole number from 0, not "file""#
    );
    assert_eq!(options().conflict("a", "b").to_string(), r#"blockdev "disk0": options "a" and "b" exclude each other"#);
    assert_eq!(
        options().unsupported_value("aio", "native").to_string(),
        r#"blockdev "disk0": option "aio": "native" is not supported yet"#
    );
    let syntax = parse_keyval("a", None).unwrap_err().about("--blockdev");
    assert_eq!(syntax.to_string(), r#"--blockdev: option "a" has no value: write it as key=value"#);
}

#[test]
fn finish_names_the_first_left_over_option() {
    let mut options = parse("raw,file.driver=file,file.x.y=1,z=2");
    options.take_str("driver").unwrap();
    options.take_str("file.driver").unwrap();
    assert_eq!(options.finish().unwrap_err().to_string(), r#"option "file.x.y" is unknown"#);
    assert_eq!(parse("l.0.a=1").finish().unwrap_err().to_string(), r#"option "l.0.a" is unknown"#);
    let dotted = parse(r#"{"file.driver": "null-co"}"#).finish().unwrap_err();
    assert_eq!(
        dotted.to_string(),
        r#"option "file.driver" is unknown: JSON nests objects where key=value has dotted keys"#
    );
}

#[test]
fn children_groups_and_lists() {
    let mut options = parse("raw,file=disk0,backing.driver=null-co,i.0=a,i.1=b,r.0.x=1,r.1.y=2,s=one");
    assert_eq!(options.take_child("file").unwrap(), Some(ChildRef::Reference("disk0".into())));
    assert_eq!(options.take_child("none").unwrap(), None);
    let mut backing = options.take_options("backing").unwrap().unwrap();
    assert_eq!(backing.path_of("x"), "backing.x");
    assert_eq!(backing.require_str("driver").unwrap(), "null-co");
    assert_eq!(options.take_str_or_list("s").unwrap(), Some(vec!["one".into()]));
    assert_eq!(options.take_str_or_list("i").unwrap(), Some(vec!["a".into(), "b".into()]));
    let mut rules = options.take_options_list("r").unwrap().unwrap();
    let second = rules.pop().unwrap();
    assert_eq!(second.finish().unwrap_err().to_string(), r#"option "r.1.y" is unknown"#);
    assert_eq!(options.require_child("f").unwrap_err().kind(), &OptionsErrorKind::Missing);

    let mut json = Options::from_json(json!({"backing": null, "file": 1})).unwrap();
    assert!(!json.take_null("file"));
    assert!(json.take_null("backing"));
    assert!(json.take_child("file").is_err());
    json.finish().unwrap();
}

#[test]
fn trees_can_be_built_in_code() {
    let mut file = Options::new();
    file.set_str("driver", "file").set_bool("cache.direct", true).set_u64("n", 1);
    let mut options = Options::new();
    options.set_str("driver", "raw").set_str("file", "x").set_options("file", file).set_bool("file.n", false);
    let tree = json!({"driver": "raw", "file": {"driver": "file", "cache": {"direct": true}, "n": false}});
    assert_eq!(options.to_json(), tree);
    assert_eq!(options.peek_str("file.driver"), Some("file"));
    assert_eq!(options.peek_str("file"), None);
    assert_eq!(options.keys().collect::<Vec<_>>(), ["driver", "file"]);
    assert_eq!(options, Options::from_json(tree).unwrap());
}

#[test]
fn names() {
    for name in ["a", "disk0", "a-b.c_d"] {
        assert!(is_valid_id(name), "{name}");
    }
    for name in ["", "0a", "_a", "#block1", "a b", "ä"] {
        assert!(!is_valid_id(name), "{name}");
    }
}

#[test]
fn lists_of_numbers_and_anything() {
    let mut options = parse("n.0=1,n.1=0x10,bad.0=x,any.a=1");
    assert_eq!(options.take_u64_list("n").unwrap(), Some(vec![1, 16]));
    assert_eq!(options.take_u64_list("n").unwrap(), None);
    let bad = options.take_u64_list("bad").unwrap_err();
    assert_eq!(bad.to_string(), r#"option "bad.0" must be a whole number from 0, not "x""#);
    assert_eq!(options.take_json("any").unwrap(), Some(json!({"a": "1"})));
    let mut options = Options::from_json(json!({"n": [7], "id": [null, {"a": 1.5}]})).unwrap();
    assert_eq!(options.take_u64_list("n").unwrap(), Some(vec![7]));
    assert_eq!(options.take_json("id").unwrap(), Some(json!([null, {"a": 1.5}])));
    options.finish().unwrap();
}
