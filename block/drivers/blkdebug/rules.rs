//! Rules: which requests of a `blkdebug` node go wrong, and how. It owns the rules, their options and the node's state;
//! it never carries anything out.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::BlockError;
use crate::node::SECTOR;
use crate::options::{Options, Result};

/// The kinds of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

use IoType::{BlockStatus, Discard, Flush, Read, Write, WriteZeroes};

const IO_TYPES: [(&str, IoType); 6] = [
    ("read", Read),
    ("write", Write),
    ("write-zeroes", WriteZeroes),
    ("discard", Discard),
    ("flush", Flush),
    ("block-status", BlockStatus),
];

/// The events that rules may name, and the kind of request that raises each; `none` stands for every request.
const EVENTS: [(&str, Option<IoType>); 9] = [
    ("none", None),
    ("read_aio", Some(Read)),
    ("write_aio", Some(Write)),
    ("pwritev", Some(Write)),
    ("pwritev_zero", Some(WriteZeroes)),
    ("pdiscard", Some(Discard)),
    ("flush_to_os", Some(Flush)),
    ("flush_to_disk", Some(Flush)),
    ("block_status", Some(BlockStatus)),
];

/// A set of kinds of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct IoTypes(u8);

impl IoTypes {
    const NONE: Self = Self(0);
    const ALL: Self = Self(0x3f);

    fn of(io: IoType) -> Self {
        Self(1 << io as u8)
    }

    fn contains(self, io: IoType) -> bool {
        self.0 & Self::of(io).0 != 0
    }
}

/// What a rule does to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    Delay(Duration),
    Fail(Fault),
    SetState(u64),
}

/// How a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    pub error: BlockError,
    /// How many bytes are transferred before that.
    pub transferred: u64,
    /// At once, not on the loop's next occasion.
    pub immediately: bool,
}

#[derive(Debug)]
struct Rule {
    effect: Effect,
    io: IoTypes,
    /// 0: in any state.
    state: u64,
    /// Only requests that cover this byte; `None`: all.
    offset: Option<u64>,
    once: bool,
}

/// What becomes of a request that some rule concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    /// How long it waits first; zero: it does not.
    pub delay: Duration,
    /// How it fails; `None`: it does not.
    pub fault: Option<Fault>,
}

/// The rules of a node.
pub(super) struct Rules {
    /// The kinds that some rule concerns; all others pass without a lock.
    concerned: IoTypes,
    live: Mutex<Live>,
}

struct Live {
    list: Vec<Rule>,
    state: u64,
}

/// The state that a node starts in, as in QEMU.
const FIRST_STATE: u64 = 1;

impl Rules {
    /// Takes the groups `inject-error`, `set-state`, `delay` and `short`.
    pub(super) fn take(options: &mut Options) -> Result<Self> {
        let mut list = Vec::new();
        for (key, effect) in [
            ("set-state", take_set_state as fn(&mut Options) -> Result<Effect>),
            ("delay", take_delay),
            ("short", take_short),
            ("inject-error", take_error),
        ] {
            for mut group in options.take_options_list(key)?.unwrap_or_default() {
                list.push(take_rule(&mut group, key, effect)?);
                group.finish()?;
            }
        }
        let concerned = list.iter().fold(IoTypes::NONE, |sum, rule| IoTypes(sum.0 | rule.io.0));
        Ok(Self { concerned, live: Mutex::new(Live { list, state: FIRST_STATE }) })
    }

    /// What becomes of a request; `None`: nothing out of the ordinary. Rules that apply once are used up by this.
    pub(super) fn judge(&self, io: IoType, offset: u64, bytes: u64) -> Option<Verdict> {
        if !self.concerned.contains(io) {
            return None;
        }
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        live.judge(io, offset, bytes)
    }
}

impl Live {
    fn judge(&mut self, io: IoType, offset: u64, bytes: u64) -> Option<Verdict> {
        let state = self.state;
        let mut verdict = Verdict { delay: Duration::ZERO, fault: None };
        let mut new_state = state;
        self.list.retain(|rule| {
            let covered = |at: u64| at >= offset && at - offset < bytes;
            let applies = rule.io.contains(io)
                && (rule.state == 0 || rule.state == state)
                && rule.offset.is_none_or(covered)
                // One failure is enough for a request.
                && !(matches!(rule.effect, Effect::Fail(_)) && verdict.fault.is_some());
            if applies {
                match rule.effect {
                    Effect::Delay(delay) => verdict.delay = verdict.delay.saturating_add(delay),
                    Effect::Fail(fault) => verdict.fault = Some(fault),
                    // All rules see the state in which the request came.
                    Effect::SetState(to) => new_state = to,
                }
            }
            !(applies && rule.once)
        });
        self.state = new_state;
        (verdict.fault.is_some() || !verdict.delay.is_zero()).then_some(verdict)
    }
}

/// What all groups have in common, with the effect that is this group's own.
fn take_rule(group: &mut Options, key: &str, effect: fn(&mut Options) -> Result<Effect>) -> Result<Rule> {
    let event = group.take_enum("event", &EVENTS)?;
    let wanted = group.take_enum("iotype", &IO_TYPES)?;
    let io = match (event, wanted) {
        // Whether anything is meant at all must show; errors and states go by event as in QEMU.
        (None, None) => return Err(group.missing(if key == "delay" || key == "short" { "iotype" } else { "event" })),
        (Some(Some(raised_by)), Some(wanted)) if raised_by != wanted => {
            let name = EVENTS.iter().find(|(_, by)| *by == Some(wanted)).map_or("none", |(name, _)| name);
            return Err(group.invalid("event", "another kind's", format!("{name:?} or \"none\" with that iotype")));
        }
        (_, Some(io)) | (Some(Some(io)), None) => IoTypes::of(io),
        (Some(None), None) => IoTypes(IoTypes::ALL.0 & !IoTypes::of(BlockStatus).0),
    };
    let effect = effect(group)?;
    if key == "short" && IoTypes(io.0 & !(IoTypes::of(Read).0 | IoTypes::of(Write).0)) != IoTypes::NONE {
        return Err(group.invalid("iotype", "another kind", "read or write: others transfer nothing"));
    }
    let highest = i64::MAX as u64 / SECTOR;
    let sector = match group.peek_str("sector") {
        Some("-1") => group.take_str("sector").map(|_| None)?,
        _ => group.take_u64_in("sector", 0..=highest)?,
    };
    Ok(Rule {
        effect,
        io,
        state: group.take_u64("state")?.unwrap_or(0),
        offset: sector.map(|sector| sector * SECTOR),
        once: group.take_bool("once")?.unwrap_or(false),
    })
}

fn take_set_state(group: &mut Options) -> Result<Effect> {
    match group.take_u64("new_state")? {
        Some(state) => Ok(Effect::SetState(state)),
        None => Err(group.missing("new_state")),
    }
}

fn take_delay(group: &mut Options) -> Result<Effect> {
    match group.take_u64("ns")? {
        Some(ns) => Ok(Effect::Delay(Duration::from_nanos(ns))),
        None => Err(group.missing("ns")),
    }
}

fn take_error(group: &mut Options) -> Result<Effect> {
    let error = take_errno(group)?;
    let immediately = group.take_bool("immediately")?.unwrap_or(false);
    Ok(Effect::Fail(Fault { error, transferred: 0, immediately }))
}

fn take_short(group: &mut Options) -> Result<Effect> {
    let error = take_errno(group)?;
    match group.take_size("bytes")? {
        Some(transferred) => Ok(Effect::Fail(Fault { error, transferred, immediately: false })),
        None => Err(group.missing("bytes")),
    }
}

/// EIO unless stated; Linux has no errno above 4095.
fn take_errno(group: &mut Options) -> Result<BlockError> {
    let errno = group.take_u64_in("errno", 1..=4095)?;
    Ok(BlockError::from_errno(errno.and_then(|errno| i32::try_from(errno).ok()).unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::parse_keyval;

    fn rules(text: &str) -> Rules {
        let mut options = parse_keyval(text, None).expect("it can be read");
        let rules = Rules::take(&mut options).expect("it means something");
        options.finish().expect("all of it is taken");
        rules
    }

    fn refused(text: &str) -> String {
        let mut options = parse_keyval(text, None).expect("it can be read");
        Rules::take(&mut options).map(|_| ()).expect_err("it means nothing").to_string()
    }

    fn error(verdict: Option<Verdict>) -> Option<BlockError> {
        verdict.and_then(|verdict| verdict.fault).map(|fault| fault.error)
    }

    #[test]
    fn a_rule_applies_to_its_event_sector_and_count() {
        let rules = rules("inject-error.0.event=read_aio,inject-error.0.sector=3,inject-error.0.once=on");
        assert_eq!(rules.judge(Write, 0, 1 << 20), None);
        assert_eq!(rules.judge(Read, 0, 3 * 512), None);
        assert_eq!(rules.judge(Read, 4 * 512, 512), None);
        assert_eq!(error(rules.judge(Read, 512, 3 * 512)), Some(BlockError::Host(libc::EIO)));
        assert_eq!(rules.judge(Read, 512, 3 * 512), None, "once");
    }

    #[test]
    fn states_lead_from_one_rule_to_the_next() {
        let rules = rules(
            "set-state.0.event=write_aio,set-state.0.state=1,set-state.0.new_state=2,\
             inject-error.0.event=flush_to_disk,inject-error.0.state=2,inject-error.0.errno=28",
        );
        assert_eq!(rules.judge(Flush, 0, 0), None);
        assert_eq!(rules.judge(Write, 0, 512), None, "it only changes the state");
        assert_eq!(error(rules.judge(Flush, 0, 0)), Some(BlockError::NoSpace));
    }

    #[test]
    fn none_is_every_request_but_block_status_unless_a_kind_is_named() {
        let all = rules("inject-error.0.event=none");
        for (_, io) in IO_TYPES {
            assert_eq!(all.judge(io, 0, 512).is_some(), io != BlockStatus, "{io:?}");
        }
        let one = rules("inject-error.0.event=none,inject-error.0.iotype=block-status,inject-error.0.sector=-1");
        for (_, io) in IO_TYPES {
            assert_eq!(one.judge(io, 0, 512).is_some(), io == BlockStatus, "{io:?}");
        }
    }

    #[test]
    fn what_can_never_apply_is_refused() {
        let unknown = refused("inject-error.0.event=nonsense");
        assert!(EVENTS.iter().all(|(name, _)| unknown.contains(name)), "{unknown}");
        assert!(refused("inject-error.0.errno=5").contains("event"));
        assert!(refused("inject-error.0.event=read_aio,inject-error.0.iotype=flush").contains("flush_to_os"));
        assert!(refused("inject-error.0.event=none,inject-error.0.wrong=1").contains("inject-error.0.wrong"));
        assert!(refused("short.0.iotype=flush,short.0.bytes=1").contains("read or write"));
        assert!(refused("delay.0.iotype=read").contains("delay.0.ns"));
        assert!(refused("inject-error.0.event=none,inject-error.0.errno=0").contains("errno"));
    }
}
