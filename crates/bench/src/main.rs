//! `make bench`: each figure beside what it is compared with, in one run.

mod client;
mod faults;
mod host;
mod measure;
mod peers;
mod report;
mod slots;

fn main() -> anyhow::Result<()> {
    let mut rows = client::rows()?;
    rows.extend(slots::rows()?);
    rows.extend(faults::rows()?);
    report::print(&rows);
    Ok(())
}
