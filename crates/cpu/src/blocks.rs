//! Decoded blocks and where to find them.

use crate::op::Op;

/// A run of instructions within one page that is entered at its first one.
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
    /// The bytes that they were decoded from.
    pub(crate) bytes: Box<[u8]>,
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

    /// The block for an address, if it is known, whether validated or not.
    pub(crate) fn find_stale(&mut self, context: u64, ip: u64) -> Option<&mut Block> {
        let index = *self.table.get(hash(context, ip))?;
        let block = self.blocks.get_mut(index as usize)?;
        (block.ip == ip && block.context == context).then_some(block)
    }

    /// Adds a block, in place of the one with the same hash.
    pub(crate) fn insert(&mut self, block: Block) {
        if self.table.is_empty() {
            self.table = vec![0; 1 << TABLE_BITS];
        }
        if self.blocks.len() >= CAPACITY {
            self.table.fill(0);
            self.blocks.clear();
        }
        if self.blocks.is_empty() {
            self.blocks.push(Block {
                context: u64::MAX,
                ip: 0,
                epoch: 0,
                next_ip: 0,
                ops: Box::default(),
                bytes: Box::default(),
            });
        }
        let slot = hash(block.context, block.ip);
        let Some(index) = self.table.get_mut(slot) else {
            return;
        };
        match self.blocks.get_mut(*index as usize) {
            Some(old) if *index != 0 => *old = block,
            _ => {
                *index = self.blocks.len() as u32;
                self.blocks.push(block);
            }
        }
    }
}
