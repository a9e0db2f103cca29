// A program whose allocator maps every block by itself and unmaps it when it is
// freed, as hardened and debugging allocators do. The library allocates with it
// too, so its own calls lead back into the library's mmap and munmap.
#include "guest.h"

#include <stdint.h>

struct header {
	void *mapping;
	size_t length;
	size_t size;
	size_t padding;
};

void *aligned_alloc(size_t alignment, size_t size)
{
	size_t length = size + alignment + sizeof(struct header);
	char *mapping = mmap(NULL, length, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mapping == MAP_FAILED)
		return NULL;
	uintptr_t block = (uintptr_t)mapping + sizeof(struct header);
	block = (block + alignment - 1) / alignment * alignment;
	((struct header *)block)[-1] = (struct header){
		.mapping = mapping, .length = length, .size = size,
	};
	return (void *)block;
}

int posix_memalign(void **block, size_t alignment, size_t size)
{
	*block = aligned_alloc(alignment, size);
	return *block ? 0 : ENOMEM;
}

void *malloc(size_t size)
{
	return aligned_alloc(16, size);
}

void *calloc(size_t count, size_t size)
{
	return malloc(count * size);
}

void free(void *block)
{
	if (!block)
		return;
	struct header *header = (struct header *)block - 1;
	munmap(header->mapping, header->length);
}

void *realloc(void *old, size_t size)
{
	void *new = malloc(size);
	if (new && old) {
		size_t known = ((struct header *)old)[-1].size;
		memcpy(new, old, known < size ? known : size);
		free(old);
	}
	return new;
}

int main(void)
{
	struct guest guest = spinning_guest();
	struct kvm_userspace_memory_region region = {
		.memory_size = 4096,
		.userspace_addr = (unsigned long)guest.memory,
	};
	// Enough slots to make whatever holds them grow and shrink.
	for (unsigned slot = 1; slot < 1000; slot++) {
		region.slot = slot;
		region.guest_phys_addr = slot * 8192UL;
		CHECK(ioctl(guest.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	}
	region.memory_size = 0;
	for (unsigned slot = 1; slot < 1000; slot++) {
		region.slot = slot;
		CHECK(ioctl(guest.vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
	}
	guest.run->immediate_exit = 1;
	CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
	close(guest.vcpu);
	close(guest.vm);
	close(guest.kvm);
	return 0;
}
