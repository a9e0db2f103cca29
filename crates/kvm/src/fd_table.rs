//! Which descriptors of the process are ours.
//!
//! Every `ioctl` and every `close` of the program asks here, so asking about a descriptor that is
//! not ours costs two loads, and finding one that is costs one locked instruction more and one when
//! the caller is done with it; nothing locks and nothing allocates. The table has two levels and
//! grows by leaves as the kernel hands out higher descriptors.
//!
//! A descriptor's entry points to a [`File`] that carries a count of its users. Files are recycled
//! but never given back to the allocator, so that a thread that lost a race against `close` reads a
//! count of zero, or a file that its entry no longer names, and never freed memory.
// UNSAFETY: entries are raw pointers to files whose life the counts govern.
#![expect(unsafe_code)]

use crate::object::Object;
use crate::sync::ProcessMutex;
use std::cell::UnsafeCell;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

const LEAF_BITS: u32 = 15;
const LEAF_ENTRIES: usize = 1 << LEAF_BITS;
const ROOT_ENTRIES: usize = 1 << (31 - LEAF_BITS);

type Leaf = [AtomicPtr<File>; LEAF_ENTRIES];

static ROOT: [AtomicPtr<Leaf>; ROOT_ENTRIES] =
    [const { AtomicPtr::new(ptr::null_mut()) }; ROOT_ENTRIES];

/// Files that no descriptor uses; also serialises every change of the table.
static SPARE: ProcessMutex<Vec<SpareFile>> = ProcessMutex::new(Vec::new());

/// What one descriptor refers to.
struct File {
    /// One for the entry that names the file, one for every [`FileRef`]. At zero the object is
    /// gone and the file is spare.
    users: AtomicUsize,
    object: UnsafeCell<Option<Object>>,
}

struct SpareFile(&'static File);

// SAFETY: a spare file has no object and is reached by whoever holds the list's lock.
unsafe impl Send for SpareFile {}

/// A descriptor's object, kept alive while this exists, whatever `close` does meanwhile.
pub(crate) struct FileRef(&'static File);

impl FileRef {
    /// The object behind the descriptor.
    #[inline]
    pub(crate) fn object(&self) -> Option<&Object> {
        // SAFETY: the object is written before the file's first user exists and taken out after
        // the last one is gone; this reference is a user.
        unsafe { &*self.0.object.get() }.as_ref()
    }
}

impl Drop for FileRef {
    #[inline]
    fn drop(&mut self) {
        release(self.0);
    }
}

#[inline]
fn entry(fd: RawFd) -> Option<&'static AtomicPtr<File>> {
    let fd = usize::try_from(fd).ok()?;
    let leaf = ROOT[fd >> LEAF_BITS].load(Ordering::Acquire);
    // SAFETY: a leaf, once published, is never freed or moved.
    let leaf = unsafe { leaf.as_ref() }?;
    Some(&leaf[fd & (LEAF_ENTRIES - 1)])
}

/// The file that `fd` names, if it is one of ours.
#[inline]
pub(crate) fn get(fd: RawFd) -> Option<FileRef> {
    let entry = entry(fd)?;
    loop {
        let pointer = entry.load(Ordering::Acquire);
        // SAFETY: files are never freed.
        let file: &'static File = unsafe { pointer.as_ref() }?;
        let mut users = file.users.load(Ordering::Relaxed);
        while users != 0 {
            match file.users.compare_exchange_weak(
                users,
                users + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    let reference = FileRef(file);
                    if ptr::eq(entry.load(Ordering::Acquire), pointer) {
                        return Some(reference);
                    }
                    break;
                }
                Err(now) => users = now,
            }
        }
        std::hint::spin_loop();
    }
}

/// Whether `fd` is one of ours.
#[inline]
pub(crate) fn contains(fd: RawFd) -> bool {
    entry(fd).is_some_and(|entry| !entry.load(Ordering::Relaxed).is_null())
}

/// Makes `fd` name `object`. What it named before is closed.
pub(crate) fn insert(fd: RawFd, object: Object) {
    let Ok(index) = usize::try_from(fd) else {
        return;
    };
    let previous = SPARE.with(|spare| {
        let root = &ROOT[index >> LEAF_BITS];
        let mut leaf = root.load(Ordering::Acquire);
        if leaf.is_null() {
            leaf = new_leaf();
            root.store(leaf, Ordering::Release);
        }
        // SAFETY: leaves are never freed.
        let entry = unsafe { &(&*leaf)[index & (LEAF_ENTRIES - 1)] };
        let file = spare.pop().map_or_else(
            || -> &'static File {
                Box::leak(Box::new(File {
                    users: AtomicUsize::new(0),
                    object: UnsafeCell::new(None),
                }))
            },
            |spare| spare.0,
        );
        // SAFETY: the file has no user, so nobody else looks at its object.
        unsafe { *file.object.get() = Some(object) };
        file.users.store(1, Ordering::Release);
        entry.swap(ptr::from_ref(file).cast_mut(), Ordering::AcqRel)
    });
    drop_entry(previous);
}

/// Takes `fd` out of the table. Its object goes when the last call that uses it has returned.
/// Whether it was in the table.
pub(crate) fn remove(fd: RawFd) -> bool {
    let Some(entry) = entry(fd) else { return false };
    if entry.load(Ordering::Relaxed).is_null() {
        return false;
    }
    let previous = entry.swap(ptr::null_mut(), Ordering::AcqRel);
    drop_entry(previous);
    !previous.is_null()
}

/// [`remove`] for every descriptor from `first` to `last`. Looks only at numbers near which one of
/// ours has ever been.
pub(crate) fn remove_range(first: u32, last: u32) {
    let (first, last) = (first as usize, last as usize);
    for (index, leaf) in ROOT
        .iter()
        .enumerate()
        .take((last >> LEAF_BITS) + 1)
        .skip(first >> LEAF_BITS)
    {
        if leaf.load(Ordering::Acquire).is_null() {
            continue;
        }
        let begin = index << LEAF_BITS;
        for fd in first.max(begin)..=last.min(begin + LEAF_ENTRIES - 1) {
            if let Ok(fd) = RawFd::try_from(fd) {
                remove(fd);
            }
        }
    }
}

/// Makes `new` name what `old` names.
pub(crate) fn duplicate(old: RawFd, new: RawFd) {
    if old == new {
        return;
    }
    match get(old).and_then(|file| file.object().map(Object::duplicate)) {
        Some(object) => insert(new, object),
        None => drop(remove(new)),
    }
}

fn drop_entry(pointer: *mut File) {
    // SAFETY: files are never freed, and the entry that named this one was its user.
    if let Some(file) = unsafe { pointer.as_ref() } {
        release(file);
    }
}

#[inline]
fn release(file: &'static File) {
    if file.users.fetch_sub(1, Ordering::AcqRel) == 1 {
        retire(file);
    }
}

#[cold]
fn retire(file: &'static File) {
    // SAFETY: the count is zero and stays zero until the file leaves the spare list again, so
    // this is the only access.
    let object = unsafe { (*file.object.get()).take() };
    if let Some(object) = object {
        object.close();
    }
    SPARE.with(|spare| spare.push(SpareFile(file)));
}

fn new_leaf() -> *mut Leaf {
    // SAFETY: all-zero bytes are a leaf of null pointers.
    Box::into_raw(unsafe { Box::<Leaf>::new_zeroed().assume_init() })
}

/// Before `fork`.
pub(crate) fn lock_for_fork() {
    SPARE.close_gate();
}

/// After `fork`.
pub(crate) fn unlock_after_fork() {
    SPARE.open_gate();
}
