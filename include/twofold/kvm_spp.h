/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Sub-page write protection: guest memory that is write-protected in pieces of
 * 128 bytes. An addition of Twofold's to the KVM API; docs/spp.md explains it.
 *
 * The same for Rust is the crate twofold-abi, module spp. A test compares the
 * two: cargo test -p twofold-abi.
 */
#ifndef TWOFOLD_KVM_SPP_H
#define TWOFOLD_KVM_SPP_H

#include <linux/ioctl.h>
#include <linux/types.h>

#ifndef KVMIO
#define KVMIO 0xAE
#endif

/*
 * KVM_CHECK_EXTENSION answers KVM_SUBPAGE_MAX_PAGES, or 0 where the processor
 * has no sub-page permissions. KVM_ENABLE_CAP on a VM turns them on.
 */
#define KVM_CAP_X86_SPP 10182

/* struct kvm_run.exit_reason: the guest wanted to write where it must not. */
#define KVM_EXIT_SPP 10029

/* Pages that one call gets or sets the maps of, at most. */
#define KVM_SUBPAGE_MAX_PAGES 512
/* Bytes that one bit of a map stands for. */
#define KVM_SUBPAGE_SIZE 128
/* The map of a page that is not protected: what every page has at first. */
#define KVM_SUBPAGE_FULL_ACCESS 0xffffffff

struct kvm_subpage {
	__u64 gfn_base;		/* first page: guest-physical address / 4096 */
	__u32 npages;		/* how many pages follow each other */
	__u32 flags;		/* 0 */
	__u32 access_map[];	/* bit i of a page's map: bytes 128 * i to
				   128 * i + 127 may be written */
};

/* ioctls on a VM. Both answer npages. */
#define KVM_SUBPAGES_GET_ACCESS _IOWR(KVMIO, 0xf0, struct kvm_subpage)
#define KVM_SUBPAGES_SET_ACCESS _IOW(KVMIO, 0xf1, struct kvm_subpage)

/*
 * With KVM_EXIT_SPP, at the union of struct kvm_run:
 *
 *	struct kvm_spp_exit *spp = (void *)&run->hw;
 *
 * The instruction has not happened. Widen the map and run the vCPU again; or
 * advance RIP by insn_len, which drops the write and whatever else the
 * instruction does; or do the instruction's work and advance RIP.
 */
struct kvm_spp_exit {
	__u64 addr;		/* guest-physical address of the first byte that
				   must not be written */
	__u8 insn_len;		/* bytes of the instruction at RIP; 0 if the write
				   is none of an instruction */
	__u8 pad[7];		/* 0 */
};

#endif
