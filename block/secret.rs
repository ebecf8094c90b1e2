//! Secrets: passphrases by the ids of the objects that hold them. It owns their memory, which is wiped when the last user
//! lets go, and keeps them out of everything that is printed; where they come from it does not know.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zeroize::Zeroizing;

use crate::error::{OpenError, OpenResult};

/// A secret's bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// Takes bytes over.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    /// The bytes themselves.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The secrets that nodes may name.
#[derive(Default)]
pub struct Secrets(Mutex<BTreeMap<String, Secret>>);

impl Secrets {
    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Secret>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one.
    ///
    /// # Errors
    /// The id is taken.
    pub fn add(&self, id: &str, secret: Secret) -> OpenResult {
        let mut all = self.all();
        if all.contains_key(id) {
            return Err(OpenError(format!("there is a secret \"{id}\" already")));
        }
        all.insert(id.to_owned(), secret);
        Ok(())
    }

    /// Forgets one. Nodes that were opened with it stay open.
    pub fn remove(&self, id: &str) -> bool {
        self.all().remove(id).is_some()
    }

    /// The secret of that id.
    pub fn find(&self, id: &str) -> Option<Secret> {
        self.all().get(id).cloned()
    }

    /// All ids, in their order.
    pub fn ids(&self) -> Vec<String> {
        self.all().keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_by_its_id_and_never_printed() {
        let secrets = Secrets::default();
        secrets.add("s", Secret::new(b"hunter2".to_vec())).expect("the id is free");
        assert!(secrets.add("s", Secret::new(Vec::new())).is_err());
        let found = secrets.find("s").expect("it is there");
        assert_eq!(found.bytes(), b"hunter2");
        assert!(!format!("{found:?}").contains("hunter2"));
        assert!(secrets.remove("s") && !secrets.remove("s") && secrets.ids().is_empty());
    }
}
