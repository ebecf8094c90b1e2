//! Tests of the split ring, rule by rule.

mod chains;
