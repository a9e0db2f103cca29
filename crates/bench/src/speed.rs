//! The processor: the kernels of `twofold-kernels` in a guest, beside QEMU's TCG and the host itself.
//!
//! The guest is the image of `hardware/speed`, run by `speed-client` under Twofold and booted by
//! `qemu-system-x86_64`. All figures of a round are taken one after the other.
//!
//! UNSAFETY: the kernels are machine code, and here they run on memory of this program.
#![expect(unsafe_code)]

use crate::client::{Figures, beside_this_program, run};
use crate::measure::{Comparison, Meter, Samples};
use crate::report::{Reach, Row};
use anyhow::{Context, Result, ensure};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::borrow::Cow;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use twofold_kernels::{
    COPIES, COPY_BYTES, KERNELS, MEMORY_BYTES, STRIDE_BYTES, STRIDE_STEPS, TIGHT_ROUNDS, copy,
    page_stride, tight,
};

const ROUNDS: usize = 5;
const TCG: &str = "QEMU TCG";
const HOST: &str = "the host itself";

/// Nanoseconds of each kernel and of the loops beside them, by name.
#[derive(Default)]
struct Rounds(Vec<Figures>);

impl Rounds {
    fn samples(&self, figure: impl Fn(&Figures) -> Option<f64>) -> Option<Samples> {
        let figures: Option<Vec<_>> = self.0.iter().map(figure).collect();
        figures
            .filter(|figures| !figures.is_empty())
            .map(Samples::of)
    }
}

/// The rows about the processor. Their instructions are not counted: processes of others take part.
pub(crate) fn rows(meter: Meter) -> Result<Vec<Row>> {
    if meter == Meter::Instructions {
        return Ok(Vec::new());
    }
    let client = beside_this_program("speed-client")?;
    let twofold = beside_this_program("twofold")?;
    let image = beside_this_program("speed.bin")?;
    let mut guest = Command::new(&twofold);
    guest.args(["run", "--"]).arg(&client).arg(&image);
    let mut ours = Rounds::default();
    let (mut qemu, mut host) = (Rounds::default(), Rounds::default());
    for _ in 0..ROUNDS {
        ours.0.push(run(&mut guest)?);
        host.0.push(on_the_host()?);
        match on_qemu(&image) {
            Ok(figures) => qemu.0.push(figures),
            Err(error) => eprintln!("qemu-system-x86_64 was not measured: {error:#}"),
        }
    }
    // What was executed is known from the guest that counts it.
    let counted = ours.0.first().cloned().unwrap_or_default();
    let rate = |name: &str, figures: &Figures| {
        let instructions = counted.get(&format!("{name}.instructions"))?;
        Some(instructions / figures.get(name)? * 1e3)
    };
    let mean = |figures: &Figures| {
        let logarithms = KERNELS
            .iter()
            .map(|(name, ..)| Some(rate(name, figures)?.ln()));
        let sum: f64 = logarithms.sum::<Option<f64>>()?;
        Some((sum / KERNELS.len() as f64).exp())
    };
    let row = |what, unit, reach, obstacle, figure: &dyn Fn(&Figures) -> Option<f64>| {
        let mut figures = Comparison::of(ours.samples(figure).unwrap_or(Samples::one(f64::NAN)));
        figures
            .peers
            .extend(qemu.samples(figure).map(|samples| (TCG, samples)));
        figures.floor = host.samples(figure).map(|samples| (HOST, samples));
        Row {
            what,
            unit,
            reach,
            figures,
            obstacle: Cow::Borrowed(obstacle),
        }
    };
    let mut rows = vec![row(
        "processor: geometric mean of six kernels",
        "M/s",
        Reach::AtLeast(250.0),
        "an interpreter: every instruction is a call through a table",
        &mean,
    )];
    let kernels = [
        "processor: integer arithmetic",
        "processor: calls and branches",
        "processor: loads and stores",
        "processor: SHA-256 by rustc",
        "processor: SSE2 floating point",
        "processor: string moves",
    ];
    for (what, (name, ..)) in kernels.into_iter().zip(KERNELS) {
        rows.push(row(what, "M/s", Reach::Anything, "", &|figures| {
            rate(name, figures)
        }));
    }
    rows.push(row(
        "processor: a loop of two instructions",
        "M/s",
        Reach::AtLeast(400.0),
        "an interpreter: every instruction is a call through a table",
        &|figures| rate("tight", figures),
    ));
    rows.push(row(
        "processor: a load from each page of 256 MiB",
        "ns",
        Reach::AtMost(60.0),
        "the walk of both stages, whose entries are not in the host's caches",
        &|figures| Some(figures.get("stride")? / STRIDE_STEPS as f64),
    ));
    let copied = (COPIES * COPY_BYTES as u64) as f64;
    rows.push(row(
        "processor: rep movsb of 1 GiB",
        "GB/s",
        Reach::Anything,
        "",
        &|figures| Some(copied / figures.get("copy")?),
    ));
    let ratio = |what, reach, obstacle, one: Option<Samples>, other: Option<Samples>| Row {
        what,
        unit: "",
        reach,
        figures: Comparison::of(match (one, other) {
            (Some(one), Some(other)) => one.over(&other),
            _ => Samples::one(f64::NAN),
        }),
        obstacle: Cow::Borrowed(obstacle),
    };
    let time = |name: &'static str| move |figures: &Figures| figures.get(name).copied();
    let gain = |figures: &Figures| Some(2.0 * figures.get("one")? / figures.get("two")?);
    rows.push(ratio(
        "processor: rep movsb of 1 GiB / the host's memcpy",
        Reach::AtLeast(0.5),
        "the copy stops at each page to translate the next, and fences its stores there",
        host.samples(time("memcpy")),
        ours.samples(time("copy")),
    ));
    rows.push(ratio(
        "processor: TLB hits, against memory mapped identically",
        Reach::AtMost(1.02),
        "a hit adds an offset whatever it is: the machine's noise",
        ours.samples(time("hits")),
        ours.samples(time("hits.identity")),
    ));
    rows.push(ratio(
        "processor: gain of two vCPUs / gain of two host cores",
        Reach::AtLeast(0.9),
        "what else the two cores have to do",
        ours.samples(gain),
        host.samples(gain),
    ));
    Ok(rows)
}

/// Nanoseconds that `work` takes.
fn nanoseconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64
}

/// Memory of this program, all of it there, for as long as the process lives.
fn memory(bytes: usize, advice: Advice) -> Result<*mut u8> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice aliases nothing.
    unsafe {
        let address = mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
        .context("mapping memory for the kernels")?;
        madvise(address, bytes, advice)?;
        madvise(address, bytes, Advice::LinuxPopulateWrite)?;
        Ok(address.cast())
    }
}

/// The kernels as functions of this program.
fn on_the_host() -> Result<Figures> {
    struct Area(*mut u8, usize);
    impl Drop for Area {
        fn drop(&mut self) {
            // SAFETY: mapped by `memory` with this size; nothing refers to it any more.
            let _ = unsafe { rustix::mm::munmap(self.0.cast(), self.1) };
        }
    }
    let area = |bytes, advice| Ok::<_, anyhow::Error>(Area(memory(bytes, advice)?, bytes));
    let small = area(2 * MEMORY_BYTES, Advice::LinuxHugepage)?;
    let large = area(STRIDE_BYTES, Advice::LinuxNoHugepage)?;
    let (from, to) = (
        area(COPY_BYTES, Advice::LinuxHugepage)?,
        area(COPY_BYTES, Advice::LinuxHugepage)?,
    );
    let mut figures = Figures::new();
    for (name, kernel, rounds) in KERNELS {
        // SAFETY: the area is large enough, and nobody else's.
        let time = nanoseconds(|| unsafe { kernel(rounds, small.0) });
        figures.insert(name.to_owned(), time);
    }
    let mut measure = |name: &str, work: &dyn Fn()| {
        figures.insert(name.to_owned(), nanoseconds(work));
    };
    // SAFETY: the areas are large enough, and nobody else's; so in the next three.
    measure("tight", &|| unsafe { tight(TIGHT_ROUNDS, small.0) });
    // SAFETY: see above.
    measure("stride", &|| unsafe { page_stride(STRIDE_STEPS, large.0) });
    measure("copy", &|| {
        // SAFETY: see above.
        (0..COPIES).for_each(|_| unsafe { copy(to.0, from.0, COPY_BYTES) });
    });
    measure("memcpy", &|| {
        // SAFETY: see above.
        (0..COPIES).for_each(|_| unsafe { from.0.copy_to_nonoverlapping(to.0, COPY_BYTES) });
    });
    let all = |memory: usize| {
        for (_, kernel, rounds) in KERNELS {
            // SAFETY: each thread has its own half of the area.
            unsafe { kernel(rounds, memory as *mut u8) };
        }
    };
    let halves = [small.0 as usize, small.0 as usize + MEMORY_BYTES];
    measure("one", &|| all(halves[0]));
    measure("two", &|| {
        std::thread::scope(|scope| {
            for half in halves {
                scope.spawn(move || all(half));
            }
        });
    });
    Ok(figures)
}

/// Boots the image on QEMU's own translator and takes the time between its marks, until the last
/// before the large copy, which takes that translator minutes.
fn on_qemu(image: &Path) -> Result<Figures> {
    let mut machine = Command::new("qemu-system-x86_64")
        .args([
            "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "1600",
        ])
        .args([
            "-display",
            "none",
            "-nodefaults",
            "-no-reboot",
            "-debugcon",
            "stdio",
        ])
        .args(["-global", "isa-debugcon.iobase=0xe9", "-kernel"])
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let marks = machine.stdout.take().context("QEMU's output")?;
    let figures = read_marks(marks);
    machine.kill()?;
    machine.wait()?;
    figures
}

fn read_marks(mut marks: impl Read) -> Result<Figures> {
    const LIMIT: Duration = Duration::from_secs(120);
    let mut figures = Figures::new();
    let names = KERNELS
        .iter()
        .map(|(name, ..)| *name)
        .chain(["tight", "stride"]);
    for (number, name) in names.enumerate() {
        let mut next = |end: u8| -> Result<Instant> {
            let mut mark = [0];
            marks
                .read_exact(&mut mark)
                .context("QEMU's guest has ended early")?;
            ensure!(
                mark[0] == b'A' + 2 * number as u8 + end,
                "QEMU's guest says {mark:?}"
            );
            Ok(Instant::now())
        };
        let (begin, end) = (next(0)?, next(1)?);
        ensure!(end - begin < LIMIT, "{name} takes QEMU minutes");
        figures.insert(name.to_owned(), (end - begin).as_nanos() as f64);
    }
    Ok(figures)
}
