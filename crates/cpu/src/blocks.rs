//! Decoded blocks and where to find them.

use crate::op::Op;
use std::cell::Cell;

/// A run of instructions within one page that is entered at its first one.
// The alignment makes the step from index to address a shift: it is on the path from each block to
// the next.
#[repr(align(128))]
pub(crate) struct Block {
    /// What [`Core::context`](crate::core_state::Core) must be.
    pub(crate) context: u64,
    /// Offset in CS of the first instruction.
    pub(crate) ip: u64,
    /// The epoch in which the bytes were last seen in memory at this address.
    pub(crate) epoch: u64,
    /// Offset in CS of the instruction after the last.
    pub(crate) next_ip: u64,
    /// The instructions. Never empty, except in the block that matches nothing.
    pub(crate) ops: Box<[Op]>,
    /// How many instructions: more than operations if the last two were fused.
    pub(crate) instructions: u32,
    /// Blocks that this one was followed by: where it went on behind itself, and where it
    /// branched to.
    pub(crate) links: [Cell<Link>; 2],
    /// The bytes that they were decoded from.
    pub(crate) bytes: Box<[u8]>,
}

/// A block that followed another in the same context.
#[derive(Clone, Copy, Default)]
pub(crate) struct Link {
    /// Its first instruction.
    ip: u64,
    /// The epoch in which it did. In this epoch neither block can have changed.
    epoch: u64,
    /// Its index.
    index: u32,
}

/// The decoded blocks of one processor: a table from address to block.
///
/// Nothing is allocated before the first block, so that processors that never run cost nothing.
#[derive(Default)]
pub(crate) struct BlockCache {
    /// For each hash the index of the block last entered under it; 0 is none.
    table: Vec<u32>,
    blocks: Vec<Block>,
}

/// log2 of the size of the table.
const TABLE_BITS: u32 = 15;
/// When so many blocks have been decoded, all are dropped.
const CAPACITY: usize = 1 << 16;

#[inline(always)]
fn hash(context: u64, ip: u64) -> usize {
    let mixed = ip ^ ip >> TABLE_BITS ^ context >> 32;
    mixed as usize & ((1 << TABLE_BITS) - 1)
}

impl BlockCache {
    /// The block for an address, if it is known and was validated in this epoch.
    #[inline(always)]
    pub(crate) fn find(&self, context: u64, ip: u64, epoch: u64) -> Option<&Block> {
        let index = *self.table.get(hash(context, ip))?;
        let block = self.blocks.get(index as usize)?;
        (block.ip == ip && block.context == context && block.epoch == epoch).then_some(block)
    }

    /// The block that `from` was followed by when it went on at `ip` before, in this epoch and
    /// without a change of context.
    #[inline(always)]
    pub(crate) fn follow(&self, from: &Block, ip: u64, epoch: u64) -> Option<&Block> {
        // Two branches, not one link chosen by `ip`: which block is next is then predicted and
        // the loads from it do not wait until `ip` is known.
        for link in &from.links {
            let link = link.get();
            if link.ip == ip && link.epoch == epoch {
                return self.blocks.get(link.index as usize);
            }
        }
        None
    }

    /// Notes that `from` was followed by the block at `ip`.
    pub(crate) fn link(&self, from: &Block, context: u64, ip: u64, epoch: u64) {
        if let Some(index) = self.table.get(hash(context, ip)) {
            from.links[usize::from(ip != from.next_ip)].set(Link {
                ip,
                epoch,
                index: *index,
            });
        }
    }

    /// The block for an address, if it is known, whether validated or not.
    pub(crate) fn find_stale(&mut self, context: u64, ip: u64) -> Option<&mut Block> {
        let index = *self.table.get(hash(context, ip))?;
        let block = self.blocks.get_mut(index as usize)?;
        (block.ip == ip && block.context == context).then_some(block)
    }

    /// Adds a block. The one with the same hash is not found any more, but stays until all are
    /// dropped, since others may be linked to it.
    pub(crate) fn insert(&mut self, block: Block) {
        if self.table.is_empty() {
            self.table = vec![0; 1 << TABLE_BITS];
        }
        if self.blocks.len() >= CAPACITY {
            self.table.fill(0);
            self.blocks.clear();
        }
        if self.blocks.is_empty() {
            // The block with index 0 matches nothing: no context has all bits set.
            self.blocks.push(Block {
                context: u64::MAX,
                ip: 0,
                epoch: 0,
                next_ip: 0,
                ops: Box::default(),
                instructions: 0,
                links: Default::default(),
                bytes: Box::default(),
            });
        }
        if let Some(index) = self.table.get_mut(hash(block.context, block.ip)) {
            *index = self.blocks.len() as u32;
            self.blocks.push(block);
        }
    }
}
