//! Progress: how far long work has come, as a line that is written over. It owns when that line is printed.

use std::cell::Cell;
use std::io::Write;

/// How far work has come.
pub struct Progress {
    shown: bool,
    total: u64,
    done: Cell<u64>,
    /// What was printed last, in hundredths of a percent.
    last: Cell<Option<u64>>,
}

impl Progress {
    /// Of work of `total` units; printed if `shown`.
    pub fn new(shown: bool, total: u64) -> Self {
        let progress = Self { shown, total, done: Cell::new(0), last: Cell::new(None) };
        progress.print();
        progress
    }

    /// So many units more are done.
    pub fn add(&self, units: u64) {
        self.done.set(self.done.get().saturating_add(units).min(self.total));
        self.print();
    }

    /// All is done.
    pub fn finish(&self) {
        self.done.set(self.total);
        self.print();
        if self.shown {
            let _ = writeln!(std::io::stdout());
        }
    }

    fn print(&self) {
        let hundredths = match self.total {
            0 => 10_000,
            total => (u128::from(self.done.get()) * 10_000 / u128::from(total)) as u64,
        };
        // A fraction of a percent at a time is enough.
        let news =
            self.last.get().is_none_or(|last| hundredths >= last + 20 || (hundredths == 10_000 && last != hundredths));
        if self.shown && news {
            self.last.set(Some(hundredths));
            let mut out = std::io::stdout();
            let _ = write!(out, "    ({}.{:02}/100%)\r", hundredths / 100, hundredths % 100);
            let _ = out.flush();
        }
    }
}
