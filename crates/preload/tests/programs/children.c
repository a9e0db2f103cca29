// A VM belongs to the process that made it: in a child its ioctls fail with EIO.
// The child may make one of its own, and whatever it does to its descriptors is
// nothing to the parent.
#include "guest.h"

#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static struct guest guest;

static void check_child(void)
{
	struct kvm_regs regs;
	CHECK(is_kvm(guest.kvm));
	CHECK(ioctl(guest.vm, KVM_CREATE_VCPU, 1) == -1 && errno == EIO);
	CHECK(ioctl(guest.vcpu, KVM_GET_REGS, &regs) == -1 && errno == EIO);
	CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1 && errno == EIO);
	CHECK(munmap(guest.memory, 4096) == 0);
	CHECK(close(guest.vcpu) == 0 && close(guest.vm) == 0);

	struct guest own = spinning_guest();
	CHECK(ioctl(own.vcpu, KVM_GET_REGS, &regs) == 0);
}

static void wait_for(pid_t child)
{
	int status;
	CHECK(child > 0);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void check_parent(void)
{
	struct kvm_regs regs;
	CHECK(ioctl(guest.vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(guest.memory[0] == 0xeb);
}

int main(void)
{
	guest = spinning_guest();

	pid_t child = fork();
	if (child == 0) {
		check_child();
		_exit(0);
	}
	wait_for(child);
	check_parent();

	// Without libc's fork, and so without its handlers.
	child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (child == 0) {
		check_child();
		_exit(0);
	}
	wait_for(child);
	check_parent();

	// In the parent's memory, but with descriptors of its own.
	child = vfork();
	if (child == 0) {
		close(guest.vcpu);
		close(guest.vm);
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	wait_for(child);
	check_parent();

	CHECK(system("exit 0") == 0);
	check_parent();
	return 0;
}
