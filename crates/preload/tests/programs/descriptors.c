// KVM's descriptors live and die as descriptors do.
#include "guest.h"

#include <sys/syscall.h>

static bool is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR);
	CHECK(kvm >= 0 && is_kvm(kvm));
	CHECK(fcntl(kvm, F_GETFD) == 0);
	int closing_on_exec = openat(AT_FDCWD, "/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(fcntl(closing_on_exec, F_GETFD) == FD_CLOEXEC);

	// Every way to copy one.
	int copies[] = {
		dup(kvm),
		dup2(kvm, 100),
		dup3(kvm, 101, O_CLOEXEC),
		fcntl(kvm, F_DUPFD, 102),
		fcntl(kvm, F_DUPFD_CLOEXEC, 103),
		syscall(SYS_dup, kvm),
	};
	int count = sizeof(copies) / sizeof(*copies);
	CHECK(close(kvm) == 0);
	CHECK(!is_kvm(kvm) && errno == EBADF);
	for (int i = 0; i < count; i++)
		CHECK(is_kvm(copies[i]));

	// The number of a closed one belongs to whoever gets it next.
	int null = open("/dev/null", O_RDWR);
	CHECK(null == kvm);
	CHECK(!is_kvm(null) && errno == ENOTTY);

	// Every way to lose one.
	CHECK(dup2(null, copies[1]) == copies[1]);
	CHECK(!is_kvm(copies[1]) && errno == ENOTTY);
	CHECK(close_range(copies[2], copies[2], 0) == 0);
	CHECK(!is_open(copies[2]) && !is_kvm(copies[2]) && errno == EBADF);
	CHECK(syscall(SYS_close, copies[3]) == 0);
	CHECK(!is_kvm(copies[3]) && errno == EBADF);
	CHECK(dup2(copies[4], copies[4]) == copies[4] && is_kvm(copies[4]));

	// A VM outlives the descriptors that it was made with, not its own.
	int vm = ioctl(copies[4], KVM_CREATE_VM, 0);
	CHECK(vm >= 0);
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	CHECK(vcpu >= 0);
	CHECK(close_range(copies[0], copies[0], CLOSE_RANGE_CLOEXEC) == 0);
	CHECK(is_kvm(copies[0]));
	CHECK(close(copies[0]) == 0 && close(copies[4]) == 0);
	CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) > 0);
	CHECK(close(vm) == 0);
	struct kvm_regs regs;
	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
	CHECK(close(vcpu) == 0);

	CHECK(ioctl(-1, KVM_GET_API_VERSION, 0) == -1 && errno == EBADF);
	CHECK(close(-1) == -1 && errno == EBADF);
	return 0;
}
