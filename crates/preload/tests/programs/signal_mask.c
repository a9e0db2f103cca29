// KVM_SET_SIGNAL_MASK: a signal that only the mask lets through ends KVM_RUN and
// stays pending, whether or not the program has a handler for it.
#include "guest.h"

#include <pthread.h>
#include <signal.h>

static struct guest guest;
static pthread_t main_thread;
static volatile int calls;

static void handler(int signal)
{
	calls++;
	(void)signal;
}

static void *send_soon(void *signal)
{
	usleep(50 * 1000);
	CHECK(pthread_kill(main_thread, (int)(long)signal) == 0);
	return NULL;
}

static void run_until(int signal)
{
	pthread_t sender;
	CHECK(pthread_create(&sender, NULL, send_soon, (void *)(long)signal) == 0);
	errno = 0;
	CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1);
	CHECK(errno == EINTR);
	CHECK(guest.run->exit_reason == KVM_EXIT_INTR);
	CHECK(pthread_join(sender, NULL) == 0);
}

static bool is_pending(int signal)
{
	sigset_t pending;
	CHECK(sigpending(&pending) == 0);
	return sigismember(&pending, signal) == 1;
}

static void take(int signal)
{
	sigset_t set;
	int taken;
	sigemptyset(&set);
	sigaddset(&set, signal);
	CHECK(sigwait(&set, &taken) == 0 && taken == signal);
}

int main(void)
{
	main_thread = pthread_self();
	guest = spinning_guest();

	sigset_t blocked;
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGUSR2);
	CHECK(pthread_sigmask(SIG_BLOCK, &blocked, NULL) == 0);
	CHECK(signal(SIGUSR2, handler) == SIG_DFL);

	struct {
		struct kvm_signal_mask head;
		unsigned char set[8];
	} mask = { .head.len = 8 };
	CHECK(ioctl(guest.vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);

	for (int i = 0; i < 3; i++) {
		run_until(SIGUSR1);
		CHECK(is_pending(SIGUSR1));
		// Still pending: the next run ends at once.
		CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
		take(SIGUSR1);
		CHECK(!is_pending(SIGUSR1));
	}

	run_until(SIGUSR2);
	CHECK(is_pending(SIGUSR2));
	CHECK(calls == 0);
	CHECK(pthread_sigmask(SIG_UNBLOCK, &blocked, NULL) == 0);
	CHECK(calls == 1);

	struct sigaction seen;
	CHECK(sigaction(SIGUSR1, NULL, &seen) == 0);
	CHECK(seen.sa_handler == SIG_DFL);
	return 0;
}
