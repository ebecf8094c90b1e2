//! Objects: what exports and nodes refer to by name, such as iothreads.
//!
//! This file owns them and what can be read and changed of each. Who uses one is for its users to say.

use std::collections::BTreeMap;

use blockport_block::aio::{AioRemote, AioSettings, Iothread, LoopFigures, PollSettings};
use blockport_block::{OpenError, OpenResult};
use nix::unistd::Pid;

use super::affinity;
use crate::options::IothreadConfig;

/// The iothread of exports that name none.
const DEFAULT_IOTHREAD: &str = "main-io";

/// An iothread and how it was configured.
pub struct IothreadObject {
    iothread: Iothread,
    config: IothreadConfig,
    /// As the kernel calls it.
    thread_id: Pid,
}

impl IothreadObject {
    /// As it is now.
    pub fn config(&self) -> &IothreadConfig {
        &self.config
    }

    /// What its loop has done.
    pub fn figures(&self) -> LoopFigures {
        self.iothread.remote().figures()
    }

    /// As the kernel calls its thread.
    pub fn thread_id(&self) -> u64 {
        self.thread_id.as_raw().unsigned_abs().into()
    }
}

/// All objects, by id.
#[derive(Default)]
pub struct Objects {
    iothreads: BTreeMap<String, IothreadObject>,
}

impl Objects {
    /// Starts an iothread, whose id nobody has.
    ///
    /// # Errors
    /// The thread or its ring cannot be made.
    pub fn add_iothread(&mut self, config: IothreadConfig) -> OpenResult {
        let id = config.id.clone();
        let refuse = |error: &dyn std::fmt::Display| OpenError(format!("iothread \"{id}\": {error}"));
        let iothread = Iothread::start(&id, AioSettings { engine: config.aio_engine, polling: polling(&config) })
            .map_err(|e| refuse(&e))?;
        let thread_id = iothread.remote().call(|_, answer| answer.give(nix::unistd::gettid()));
        let thread_id = thread_id.ok_or_else(|| refuse(&"it ended before it began"))?;
        if let Some(cpus) = &config.cpu_affinity {
            affinity::bind(thread_id, cpus).map_err(|e| refuse(&e))?;
        }
        self.iothreads.insert(id, IothreadObject { iothread, config, thread_id });
        Ok(())
    }

    /// Ends an object that nobody uses. `users`: the names of those who use an iothread of that id.
    ///
    /// # Errors
    /// There is none of that id, or it is in use.
    pub fn remove(&mut self, id: &str, users: &[&str]) -> OpenResult {
        if !self.iothreads.contains_key(id) {
            return Err(OpenError(format!("object '{id}' not found")));
        }
        if !users.is_empty() {
            let users = users.join(", ");
            return Err(OpenError(format!("object '{id}' is in use by {users}, can not be deleted")));
        }
        self.iothreads.remove(id);
        Ok(())
    }

    /// The iothreads, in the order of their ids.
    pub fn iothreads(&self) -> impl Iterator<Item = &IothreadObject> {
        self.iothreads.values()
    }

    /// The iothread of that id.
    pub fn iothread(&self, id: &str) -> Option<&IothreadObject> {
        self.iothreads.get(id)
    }

    /// Changes how an iothread polls, at once. The configuration's id says which.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn set_iothread(&mut self, config: IothreadConfig) -> OpenResult {
        let Some(object) = self.iothreads.get_mut(&config.id) else {
            return Err(OpenError(format!("object '{}' not found", config.id)));
        };
        let polling = polling(&config);
        object.iothread.remote().post(move |context| context.set_poll_settings(polling));
        object.config = config;
        Ok(())
    }

    /// The iothreads of these ids; the shared default one if there are none, which is started if need be.
    ///
    /// # Errors
    /// There is none of some id, or the default one cannot be started.
    pub fn remotes(&mut self, ids: &[String]) -> OpenResult<(Vec<String>, Vec<AioRemote>)> {
        let default = [DEFAULT_IOTHREAD.to_owned()];
        let mut ids = ids;
        if ids.is_empty() {
            if !self.iothreads.contains_key(DEFAULT_IOTHREAD) {
                self.add_iothread(IothreadConfig::new(DEFAULT_IOTHREAD))?;
            }
            ids = &default;
        }
        let find = |id: &String| {
            let object = self.iothreads.get(id).ok_or_else(|| OpenError(format!("there is no iothread \"{id}\"")))?;
            Ok(object.iothread.remote().clone())
        };
        Ok((ids.to_vec(), ids.iter().map(find).collect::<OpenResult<_>>()?))
    }
}

fn polling(config: &IothreadConfig) -> PollSettings {
    let IothreadConfig { poll_max_ns, poll_grow, poll_shrink, .. } = *config;
    PollSettings { poll_max_ns, poll_grow, poll_shrink }
}
