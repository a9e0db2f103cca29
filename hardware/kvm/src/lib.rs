//! What a KVM does to second-stage entries while `transitions` runs: read from the trace of the real
//! one or from Twofold's log messages, brought into one form, and compared.
//!
//! [`event`] reads the two kinds of lines, [`history`] makes of them what each thing that the
//! program did has changed, [`known`] has the differences that are explained.

pub mod entry;
pub mod event;
pub mod history;
pub mod known;
