//! ConfigNews: what a front-end knows of the config space, and the channel on which it is told that this has changed.
//! QEMU drops such a message while the device is not started, and does not read the config again when it reconnects; so
//! what it read last is remembered, and it is told once its rings start whenever that is not what there is now.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::config_space::{CONFIG_BYTES, WRITEBACK_OFFSET};
use crate::extra_messages;
use crate::handover::{Descriptors, SessionImage};

/// A config space.
type Config = [u8; CONFIG_BYTES];

#[derive(Default)]
pub(super) struct ConfigNews(Mutex<State>);

#[derive(Default)]
struct State {
    /// `None`: the front-end has no back-end channel, and reads the config when it likes to.
    channel: Option<UnixStream>,
    /// What the front-end was told last while it listened, or has read, but for the writeback byte, which it sets itself.
    /// `None`: this connection knows nothing.
    known: Option<Config>,
    /// Whether it listens: a ring is started.
    listens: bool,
}

impl ConfigNews {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_channel(&self, channel: UnixStream) {
        self.state().channel = Some(channel);
    }

    /// What a process after us must know: the place of the channel, the config as known, whether rings are started.
    ///
    /// # Errors
    /// There are too few descriptors.
    pub(super) fn image(&self, descriptors: &mut Descriptors) -> io::Result<(Option<usize>, Option<Vec<u8>>, bool)> {
        let state = self.state();
        let channel = state.channel.as_ref().map(|channel| descriptors.add(channel)).transpose()?;
        Ok((channel, state.known.map(|known| known.to_vec()), state.listens))
    }

    /// The same in that process.
    ///
    /// # Errors
    /// Prose: the config has another size.
    pub(super) fn resumed(channel: Option<UnixStream>, image: &SessionImage) -> Result<Self, String> {
        let known = image.known_config.as_deref().map(Config::try_from).transpose();
        let known = known.map_err(|_| format!("a config space that has not {CONFIG_BYTES} bytes"))?;
        Ok(Self(Mutex::new(State { channel, known, listens: image.listens })))
    }

    /// The front-end has read it.
    pub(super) fn read(&self, config: Config) {
        self.state().known = Some(without_writeback(config));
    }

    /// It has changed. Does not wait.
    ///
    /// # Errors
    /// The message could not be sent.
    pub(super) fn changed(&self, config: Config) -> io::Result<()> {
        let mut state = self.state();
        if state.listens {
            state.known = Some(without_writeback(config));
        }
        state.send()
    }

    /// A ring runs from now on: whoever does not know the config is told. Does not wait.
    ///
    /// # Errors
    /// The message could not be sent.
    pub(super) fn ring_starts(&self, config: Config) -> io::Result<()> {
        let config = Some(without_writeback(config));
        let mut state = self.state();
        state.listens = true;
        if state.known == config {
            return Ok(());
        }
        state.known = config;
        state.send()
    }

    /// No ring runs any more.
    pub(super) fn rings_stop(&self) {
        self.state().listens = false;
    }
}

impl State {
    fn send(&self) -> io::Result<()> {
        self.channel.as_ref().map_or(Ok(()), extra_messages::send_config_change)
    }
}

fn without_writeback(mut config: Config) -> Config {
    config[WRITEBACK_OFFSET as usize] = 0;
    config
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const OLD: Config = [1; CONFIG_BYTES];
    const NEW: Config = [2; CONFIG_BYTES];

    /// News with a channel, and the front-end's end of it.
    fn news() -> (ConfigNews, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        theirs.set_nonblocking(true).expect("a socket");
        let news = ConfigNews::default();
        news.set_channel(ours);
        (news, theirs)
    }

    /// How many messages have come.
    fn messages(mut channel: &UnixStream) -> usize {
        let mut bytes = Vec::new();
        let _ = channel.read_to_end(&mut bytes);
        assert_eq!(bytes.len() % extra_messages::HEADER_BYTES, 0);
        bytes.len() / extra_messages::HEADER_BYTES
    }

    #[test]
    fn who_has_read_what_there_is_is_told_nothing_when_its_ring_starts() {
        let (news, channel) = news();
        news.read(OLD);
        news.ring_starts(OLD).expect("room");
        news.ring_starts(OLD).expect("room");
        let mut switched = OLD;
        switched[WRITEBACK_OFFSET as usize] = 0;
        news.ring_starts(switched).expect("room");
        assert_eq!(messages(&channel), 0);
    }

    #[test]
    fn a_change_while_no_ring_runs_is_told_again_when_one_starts() {
        let (news, channel) = news();
        news.read(OLD);
        news.changed(NEW).expect("room");
        assert_eq!(messages(&channel), 1, "whoever listens all the same");
        news.ring_starts(NEW).expect("room");
        assert_eq!(messages(&channel), 1);
        news.ring_starts(NEW).expect("room");
        assert_eq!(messages(&channel), 0, "once, however many rings");
        news.changed(OLD).expect("room");
        news.rings_stop();
        news.ring_starts(OLD).expect("room");
        assert_eq!(messages(&channel), 1, "it was told while rings ran");
    }

    #[test]
    fn who_reconnects_without_reading_is_told_always() {
        let (news, channel) = news();
        news.ring_starts(OLD).expect("room");
        assert_eq!(messages(&channel), 1);
    }

    #[test]
    fn who_has_no_channel_is_left_alone() {
        let news = ConfigNews::default();
        news.changed(NEW).expect("nothing to do");
        news.ring_starts(OLD).expect("nothing to do");
    }
}
