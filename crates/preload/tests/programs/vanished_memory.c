// Guest memory that is taken away while the guest uses it ends KVM_RUN with
// EFAULT, whether Twofold saw it go or not, and never ends the program.
// (Kernels without two-dimensional paging answer otherwise, so this one has no
// judge but the documentation of KVM_RUN.)
#include "guest.h"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>

static struct guest guest;

static void unmap_visibly(void)
{
	CHECK(munmap(guest.memory, 4096) == 0);
}

static void unmap_invisibly(void)
{
	long result;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(SYS_munmap), "D"(guest.memory), "S"(4096UL)
			 : "rcx", "r11", "memory");
	CHECK(result == 0);
}

static int file;

static void truncate_visibly(void)
{
	CHECK(ftruncate(file, 0) == 0);
}

static void truncate_invisibly(void)
{
	long result;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "0"(SYS_ftruncate), "D"(file), "S"(0UL)
			 : "rcx", "r11", "memory");
	CHECK(result == 0);
}

static void *soon(void *deed)
{
	usleep(50 * 1000);
	((void (*)(void))deed)();
	return NULL;
}

static void check(bool mapped_file, void (*deed)(void))
{
	guest = spinning_guest();
	// `inc byte [0x800]; jmp` to it, so that the guest uses its data too.
	memcpy(guest.memory, "\xfe\x06\x00\x08\xeb\xfa", 6);
	if (mapped_file) {
		file = memfd_create("guest", 0);
		CHECK(ftruncate(file, 4096) == 0);
		CHECK(pwrite(file, guest.memory, 4096, 0) == 4096);
		CHECK(mmap(guest.memory, 4096, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_FIXED, file, 0) == guest.memory);
	}
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, soon, (void *)deed) == 0);
	errno = 0;
	CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1);
	CHECK(errno == EFAULT);
	CHECK(pthread_join(thread, NULL) == 0);
	// Again, since nothing has come back.
	CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1 && errno == EFAULT);
	close(guest.vcpu);
	close(guest.vm);
	close(guest.kvm);
}

// Threads of VMMs block all signals. The thread that runs the guest survives its
// faults nevertheless, and those of pointers that go with an ioctl.
static void check_with_all_signals_blocked(void)
{
	sigset_t all;
	sigfillset(&all);
	CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
	check(false, unmap_invisibly);
	CHECK(sigprocmask(SIG_SETMASK, &all, NULL) == 0);
	check(true, truncate_invisibly);

	guest = spinning_guest();
	CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
	CHECK(ioctl(guest.vcpu, KVM_GET_REGS, 8) == -1 && errno == EFAULT);
	CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
	CHECK(ioctl(guest.vcpu, KVM_SET_REGS, -8L) == -1 && errno == EFAULT);
	CHECK(pthread_sigmask(SIG_SETMASK, NULL, &all) == 0);
	CHECK(sigismember(&all, SIGUSR1) == 1);
}

int main(void)
{
	check(false, unmap_visibly);
	check(false, unmap_invisibly);
	check(true, truncate_visibly);
	check(true, truncate_invisibly);
	check_with_all_signals_blocked();
	return 0;
}
