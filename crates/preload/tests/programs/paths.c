// /dev/kvm and the parameters of KVM's modules are there, by every name of every
// call; other files are what they are.
#include "guest.h"

#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#define PARAMETER "/sys/module/kvm/parameters/force_emulation_prefix"

static void check_device(const struct stat *status)
{
	CHECK(S_ISCHR(status->st_mode));
	CHECK(status->st_rdev == makedev(10, 232));
}

static void check_parameter(int fd)
{
	char text[18];
	CHECK(fd >= 0);
	ssize_t len = read(fd, text, sizeof(text));
	CHECK(len == 2 && text[1] == '\n');
	CHECK(close(fd) == 0);
}

int main(void)
{
	struct stat status;
	struct statx more;
	CHECK(stat("/dev/kvm", &status) == 0);
	check_device(&status);
	CHECK(lstat("/dev/kvm", &status) == 0);
	check_device(&status);
	CHECK(fstatat(AT_FDCWD, "/dev/kvm", &status, 0) == 0);
	check_device(&status);
	CHECK(syscall(SYS_stat, "/dev/kvm", &status) == 0);
	check_device(&status);
	CHECK(statx(AT_FDCWD, "/dev/kvm", 0, STATX_BASIC_STATS, &more) == 0);
	CHECK(S_ISCHR(more.stx_mode));
	CHECK(more.stx_rdev_major == 10 && more.stx_rdev_minor == 232);

	CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
	CHECK(access("/dev/kvm", F_OK) == 0);
	CHECK(euidaccess("/dev/kvm", R_OK | W_OK) == 0);
	CHECK(faccessat(AT_FDCWD, "/dev/kvm", R_OK, AT_EACCESS) == 0);
	CHECK(access("/dev/kvm", X_OK) == -1 && errno == EACCES);

	CHECK(is_kvm(open("/dev/kvm", O_RDWR)));
	CHECK(is_kvm(open("/dev/kvm", O_RDONLY)));
	CHECK(is_kvm(openat(1234, "/dev/kvm", O_RDWR)));
	CHECK(is_kvm(open("/dev/kvm", O_RDWR | O_CREAT, 0600)));
	CHECK(is_kvm(syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR)));
	CHECK(open("/dev/kvm", O_RDWR | O_DIRECTORY) == -1 && errno == ENOTDIR);
	CHECK(open("/dev/kvm", O_CREAT | O_EXCL | O_RDWR, 0600) == -1);
	CHECK(errno == EEXIST);
	FILE *stream = fopen("/dev/kvm", "r+");
	CHECK(stream && is_kvm(fileno(stream)));
	int number = fileno(stream);
	CHECK(fclose(stream) == 0);
	CHECK(open("/dev/null", O_RDONLY) == number && !is_kvm(number));

	check_parameter(open(PARAMETER, O_RDONLY));
	check_parameter(openat(AT_FDCWD, PARAMETER, O_RDONLY | O_CLOEXEC));
	stream = fopen(PARAMETER, "r");
	CHECK(stream && fgetc(stream) != EOF && fgetc(stream) == '\n');
	CHECK(fgetc(stream) == EOF && fclose(stream) == 0);
	CHECK(stat(PARAMETER, &status) == 0 && S_ISREG(status.st_mode));
	CHECK(access("/sys/module/kvm", F_OK) == 0);
	CHECK(stat("/sys/module/kvm/parameters", &status) == 0);
	CHECK(S_ISDIR(status.st_mode));
	CHECK(open("/sys/module/kvm/parameters/none", O_RDONLY) == -1);
	CHECK(errno == ENOENT);

	// Everything else.
	CHECK(open("/nonexistent", O_RDWR) == -1 && errno == ENOENT);
	CHECK(stat("/dev/null/x", &status) == -1 && errno == ENOTDIR);
	CHECK(stat("/dev/null", &status) == 0 && minor(status.st_rdev) == 3);
	CHECK(fopen("/nonexistent", "r") == NULL && errno == ENOENT);
	CHECK(access("/nonexistent", F_OK) == -1 && errno == ENOENT);
	char file[] = "/tmp/twofold-paths-XXXXXX";
	int fd = mkstemp(file);
	CHECK(fd >= 0 && fstat(fd, &status) == 0);
	CHECK(S_ISREG(status.st_mode));
	CHECK(fallocate(fd, 0, 0, 8192) == 0 && ftruncate(fd, 4096) == 0);
	CHECK(unlink(file) == 0);
	return 0;
}
