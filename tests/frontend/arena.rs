//! Room in guest memory for rings and buffers: ranges handed out from the front, given back all at once.

/// Guest-physical ranges from which buffers are cut, in turn, so that the parts of one request lie in several regions.
#[derive(Debug)]
pub struct Arena {
    ranges: Vec<(u64, u64)>,
    used: Vec<u64>,
    turn: usize,
}

/// How full an arena was.
#[derive(Debug, Clone)]
pub struct Mark(Vec<u64>);

impl Arena {
    /// An arena over ranges of (guest-physical start, bytes).
    pub fn new(ranges: Vec<(u64, u64)>) -> Self {
        Self { used: vec![0; ranges.len()], ranges, turn: 0 }
    }

    /// Cuts off `bytes` at an address that is a multiple of `align` plus `skew`, with a gap before it.
    #[track_caller]
    pub fn cut(&mut self, bytes: u64, align: u64, skew: u64) -> u64 {
        for _ in 0..self.ranges.len() {
            let range = self.turn;
            self.turn = (self.turn + 1) % self.ranges.len();
            let (start, size) = self.ranges[range];
            let address = (start + self.used[range] + 1).next_multiple_of(align) + skew;
            if address + bytes <= start + size {
                self.used[range] = address + bytes - start;
                return address;
            }
        }
        panic!("no {bytes} bytes left in {:x?}", self.ranges);
    }

    pub fn mark(&self) -> Mark {
        Mark(self.used.clone())
    }

    /// Gives back everything cut off since.
    pub fn release(&mut self, mark: &Mark) {
        self.used.clone_from(&mark.0);
    }
}
