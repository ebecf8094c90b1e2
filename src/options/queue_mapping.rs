//! Which iothread serves which queue of an export: `iothread`, `iothreads` or `iothread-vq-mapping`.
//!
//! This file owns these options and the rules of an explicit mapping: all queues or none, each exactly once. Whether the
//! iothreads exist is found out at start.

use blockport_block::options::{Options, Result};

/// The iothreads of an export, and its queues on them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueMapping {
    /// The iothreads, in order, each once. Empty: the daemon chooses.
    pub iothreads: Vec<String>,
    /// For each queue the place of its iothread in that list. Empty: queue `n` is on iothread `n` modulo their number.
    pub queues: Vec<usize>,
}

impl QueueMapping {
    /// Takes the options that say where the export's `num_queues` queues are.
    pub fn take(options: &mut Options, num_queues: u16) -> Result<Self> {
        const MAPPING: &str = "iothread-vq-mapping";
        let one = options.take_str_or_list("iothread")?;
        let several = options.take_str_or_list("iothreads")?;
        let mapping = options.take_options_list(MAPPING)?;
        match (one, several, mapping) {
            (Some(_), Some(_), _) => Err(options.conflict("iothread", "iothreads")),
            (Some(_), _, Some(_)) => Err(options.conflict("iothread", MAPPING)),
            (_, Some(_), Some(_)) => Err(options.conflict("iothreads", MAPPING)),
            (one, several, None) => Ok(Self { iothreads: one.or(several).unwrap_or_default(), queues: Vec::new() }),
            (None, None, Some(mapping)) if mapping.is_empty() => {
                Err(options.invalid(MAPPING, "[]", "a list of at least one iothread"))
            }
            (None, None, Some(mapping)) => {
                let (taken, unserved) = Self::explicit(mapping, num_queues)?;
                match unserved {
                    Some(queue) => Err(options.invalid(
                        MAPPING,
                        format!("a mapping without queue {queue}"),
                        format!("a mapping of all {num_queues} queues"),
                    )),
                    None => Ok(taken),
                }
            }
        }
    }

    /// The mapping, and the first queue that is in none of its lists though others are.
    fn explicit(mapping: Vec<Options>, num_queues: u16) -> Result<(Self, Option<usize>)> {
        let mut iothreads: Vec<String> = Vec::new();
        let mut queues: Vec<Option<usize>> = vec![None; num_queues.into()];
        let mut listed = None;
        for mut entry in mapping {
            let name = entry.require_str("iothread")?;
            if iothreads.contains(&name) {
                return Err(entry.invalid("iothread", name, "an iothread that no other entry names"));
            }
            let vqs = entry.take_u64_list("vqs")?;
            if *listed.get_or_insert(vqs.is_some()) != vqs.is_some() {
                let given = if vqs.is_some() { "given" } else { "left out" };
                return Err(entry.invalid("vqs", given, "given for all iothreads or for none"));
            }
            for queue in vqs.into_iter().flatten() {
                let place = usize::try_from(queue).ok().and_then(|queue| queues.get_mut(queue));
                let Some(place) = place else {
                    return Err(entry.invalid("vqs", queue, format!("queues from 0 to {}", num_queues - 1)));
                };
                if let Some(other) = place.replace(iothreads.len()) {
                    let other = iothreads.get(other).unwrap_or(&name);
                    return Err(entry.invalid("vqs", queue, format!("a queue that iothread \"{other}\" has not got")));
                }
            }
            entry.finish()?;
            iothreads.push(name);
        }
        if listed != Some(true) {
            return Ok((Self { iothreads, queues: Vec::new() }, None));
        }
        let unserved = queues.iter().position(Option::is_none);
        Ok((Self { iothreads, queues: queues.into_iter().flatten().collect() }, unserved))
    }

    /// What each queue in turn is served by; queue `n` by the one at `n` modulo their number. `of_iothreads`: something of
    /// each iothread, in the order of [`QueueMapping::iothreads`].
    pub fn spread<T: Clone>(&self, of_iothreads: Vec<T>) -> Vec<T> {
        if self.queues.is_empty() {
            return of_iothreads;
        }
        self.queues.iter().filter_map(|iothread| of_iothreads.get(*iothread).cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use blockport_block::options::parse_keyval;
    use serde_json::json;

    use super::*;

    fn read(text: &str, num_queues: u16) -> Result<QueueMapping> {
        let mut options = parse_keyval(text, None).expect(text);
        let mapping = QueueMapping::take(&mut options, num_queues)?;
        options.finish()?;
        Ok(mapping)
    }

    fn mapping(iothreads: &[&str], queues: &[usize]) -> QueueMapping {
        QueueMapping { iothreads: iothreads.iter().map(ToString::to_string).collect(), queues: queues.to_vec() }
    }

    #[test]
    fn queues_are_spread_evenly_unless_they_are_mapped() {
        for text in ["iothreads.0=a,iothreads.1=b", "iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.1.iothread=b"]
        {
            assert_eq!(read(text, 3).expect(text), mapping(&["a", "b"], &[]));
        }
        assert_eq!(read("iothread=a", 3).expect("one"), mapping(&["a"], &[]));
        assert_eq!(read("x=1", 1).expect_err("unknown").to_string(), r#"option "x" is unknown"#);
    }

    #[test]
    fn a_mapping_says_where_each_queue_is() {
        let text = "iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.0.vqs.0=2,iothread-vq-mapping.1.iothread=b,\
                    iothread-vq-mapping.1.vqs.0=0,iothread-vq-mapping.1.vqs.1=1";
        let found = read(text, 3).expect(text);
        assert_eq!(found, mapping(&["a", "b"], &[1, 1, 0]));
        assert_eq!(found.spread(vec!['a', 'b']), ['b', 'b', 'a']);
        let json = json!({"iothread-vq-mapping": [{"iothread": "a", "vqs": [2]}, {"iothread": "b", "vqs": [0, 1]}]});
        let mut json = Options::from_json(json).expect("an object");
        assert_eq!(QueueMapping::take(&mut json, 3).expect("the same"), found);
        json.finish().expect("all of it was read");
        assert_eq!(mapping(&["a", "b"], &[]).spread(vec!['a', 'b']), ['a', 'b']);
    }

    #[test]
    fn refusals() {
        const A: &str = "iothread-vq-mapping.0.iothread=a,";
        const B: &str = "iothread-vq-mapping.1.iothread=b,";
        for (text, complaint) in [
            (format!("iothread=c,{A}"), r#"options "iothread" and "iothread-vq-mapping" exclude each other"#),
            (format!("iothreads.0=c,{A}"), r#"options "iothreads" and "iothread-vq-mapping" exclude each other"#),
            (
                format!("{A}iothread-vq-mapping.1.iothread=a"),
                r#"option "iothread-vq-mapping.1.iothread" must be an iothread that no other entry names, not "a""#,
            ),
            (
                format!("{A}{B}iothread-vq-mapping.0.vqs.0=0"),
                r#"option "iothread-vq-mapping.1.vqs" must be given for all iothreads or for none, not "left out""#,
            ),
            (
                format!("{A}iothread-vq-mapping.0.vqs.0=2"),
                r#"option "iothread-vq-mapping.0.vqs" must be queues from 0 to 1, not "2""#,
            ),
            (
                format!("{A}iothread-vq-mapping.0.vqs.0=0,{B}iothread-vq-mapping.1.vqs.0=0"),
                r#"option "iothread-vq-mapping.1.vqs" must be a queue that iothread "a" has not got, not "0""#,
            ),
            (
                format!("{A}iothread-vq-mapping.0.vqs.0=1"),
                r#"option "iothread-vq-mapping" must be a mapping of all 2 queues, not "a mapping without queue 0""#,
            ),
            ("iothread-vq-mapping.0.vqs.0=0".into(), r#"option "iothread-vq-mapping.0.iothread" is missing"#),
            (format!("{A}iothread-vq-mapping.0.x=1"), r#"option "iothread-vq-mapping.0.x" is unknown"#),
            ("iothread-vq-mapping=a".into(), r#"option "iothread-vq-mapping" must be a list, its elements"#),
        ] {
            let text = text.trim_end_matches(',');
            let error = read(text, 2).expect_err(text).to_string();
            assert!(error.starts_with(complaint), "{text}: {error}");
        }
    }
}
