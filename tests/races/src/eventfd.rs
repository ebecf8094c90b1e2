//! An eventfd as the loop uses it: written by others, waited for by one, and its count taken by the wait (the kernel's
//! multishot poll tells of each write once).

use loom::sync::{Condvar, Mutex};

pub struct Eventfd {
    count: Mutex<u32>,
    written: Condvar,
}

impl Eventfd {
    pub fn new() -> Self {
        Self { count: Mutex::new(0), written: Condvar::new() }
    }

    pub fn write(&self) {
        *self.count.lock().unwrap() += 1;
        self.written.notify_one();
    }

    pub fn wait(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.written.wait(count).unwrap();
        }
        *count = 0;
    }
}
