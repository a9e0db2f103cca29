// What the programs of these tests share: checks that name what failed, and a
// guest that does nothing but jump to itself.
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition)                                                       \
	do {                                                                   \
		if (!(condition)) {                                            \
			fprintf(stderr, "%s:%d: %s (errno: %s)\n", __FILE__,   \
				__LINE__, #condition, strerror(errno));        \
			_exit(1);                                              \
		}                                                              \
	} while (0)

static inline bool is_kvm(int fd)
{
	return ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION;
}

struct guest {
	int kvm;
	int vm;
	int vcpu;
	struct kvm_run *run;
	unsigned char *memory;
};

// A VM with one page of memory and one vCPU, about to execute `jmp` to itself in
// real mode at address 0.
static inline struct guest spinning_guest(void)
{
	struct guest guest;
	guest.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(guest.kvm >= 0);
	guest.vm = ioctl(guest.kvm, KVM_CREATE_VM, 0);
	CHECK(guest.vm >= 0);

	guest.memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(guest.memory != MAP_FAILED);
	memcpy(guest.memory, "\xeb\xfe", 2);
	struct kvm_userspace_memory_region region = {
		.memory_size = 4096,
		.userspace_addr = (unsigned long)guest.memory,
	};
	CHECK(ioctl(guest.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);

	guest.vcpu = ioctl(guest.vm, KVM_CREATE_VCPU, 0);
	CHECK(guest.vcpu >= 0);
	int size = ioctl(guest.kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	CHECK(size > 0);
	guest.run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED,
			 guest.vcpu, 0);
	CHECK(guest.run != MAP_FAILED);

	struct kvm_sregs sregs;
	CHECK(ioctl(guest.vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	CHECK(ioctl(guest.vcpu, KVM_SET_SREGS, &sregs) == 0);
	struct kvm_regs regs = { .rip = 0, .rflags = 2 };
	CHECK(ioctl(guest.vcpu, KVM_SET_REGS, &regs) == 0);
	return guest;
}
