// A signal ends KVM_RUN, and its handler runs when KVM_RUN is over, as the
// program asked for it: with its siginfo, on its stack, once if once.
#include "guest.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>

static struct guest guest;
static volatile int calls;
static volatile int value;
static volatile bool vcpu_was_usable;
static volatile bool on_alternate_stack;
static sigjmp_buf elsewhere;
static char alternate_stack[65536];

static void run_until_interrupted(void)
{
	errno = 0;
	CHECK(ioctl(guest.vcpu, KVM_RUN, 0) == -1);
	CHECK(errno == EINTR);
}

static void send_after(int milliseconds)
{
	struct itimerval timer = { .it_value.tv_usec = milliseconds * 1000 };
	CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

static void use_vcpu(int signal)
{
	struct kvm_regs regs;
	char here;
	calls++;
	vcpu_was_usable = ioctl(guest.vcpu, KVM_GET_REGS, &regs) == 0;
	on_alternate_stack = &here >= alternate_stack &&
			     &here < alternate_stack + sizeof(alternate_stack);
	errno = 0; // of no concern to the interrupted call
	(void)signal;
}

static void take_value(int signal, siginfo_t *info, void *context)
{
	calls++;
	value = value * 10 + info->si_value.sival_int;
	(void)signal, (void)context;
}

static void leave(int signal)
{
	calls++;
	siglongjmp(elsewhere, 1);
	(void)signal;
}

static pthread_t main_thread;

static void *queue_two(void *unused)
{
	union sigval one = { .sival_int = 1 }, two = { .sival_int = 2 };
	usleep(50 * 1000);
	CHECK(pthread_sigqueue(main_thread, SIGRTMIN, one) == 0);
	CHECK(pthread_sigqueue(main_thread, SIGRTMIN, two) == 0);
	return unused;
}

int main(void)
{
	// One handler is there before /dev/kvm is opened.
	struct sigaction before = { .sa_handler = use_vcpu, .sa_flags = SA_RESTART };
	CHECK(sigaction(SIGALRM, &before, NULL) == 0);

	guest = spinning_guest();
	struct sigaction seen;
	CHECK(sigaction(SIGALRM, NULL, &seen) == 0);
	CHECK(seen.sa_handler == use_vcpu && (seen.sa_flags & SA_RESTART));
	CHECK(!(seen.sa_flags & SA_SIGINFO));

	// The handler may use the vCPU, since the run is over. Many times.
	for (int i = 1; i <= 20; i++) {
		send_after(5);
		run_until_interrupted();
		CHECK(calls == i);
		CHECK(vcpu_was_usable);
	}

	// A signal that came before the run does not end it.
	calls = 0;
	raise(SIGALRM);
	CHECK(calls == 1);
	send_after(50);
	run_until_interrupted();
	CHECK(calls == 2);

	// Queued signals keep what they carry. The second one may come after
	// the end of the run that the first one ended.
	struct sigaction queued = { .sa_sigaction = take_value,
				    .sa_flags = SA_SIGINFO };
	CHECK(sigaction(SIGRTMIN, &queued, NULL) == 0);
	calls = 0;
	main_thread = pthread_self();
	pthread_t sender;
	CHECK(pthread_create(&sender, NULL, queue_two, NULL) == 0);
	run_until_interrupted();
	CHECK(pthread_join(sender, NULL) == 0);
	CHECK(calls == 2);
	CHECK(value == 12 || value == 21);

	// On the alternate stack, and only once.
	stack_t stack = { .ss_sp = alternate_stack,
			  .ss_size = sizeof(alternate_stack) };
	CHECK(sigaltstack(&stack, NULL) == 0);
	struct sigaction once = { .sa_handler = use_vcpu,
				  .sa_flags = SA_ONSTACK | SA_RESETHAND };
	CHECK(sigaction(SIGALRM, &once, &seen) == 0);
	CHECK(seen.sa_handler == use_vcpu);
	calls = 0;
	send_after(50);
	run_until_interrupted();
	CHECK(calls == 1);
	CHECK(on_alternate_stack);
	CHECK(sigaction(SIGALRM, NULL, &seen) == 0);
	CHECK(seen.sa_handler == SIG_DFL);

	// A handler may leave by a jump; the vCPU runs again afterwards.
	CHECK(signal(SIGALRM, leave) == SIG_DFL);
	calls = 0;
	for (volatile int i = 1; i <= 3; i++) {
		if (sigsetjmp(elsewhere, 1) == 0) {
			send_after(20);
			ioctl(guest.vcpu, KVM_RUN, 0);
			CHECK(!"KVM_RUN returned though the handler jumped");
		}
		CHECK(calls == i);
	}

	// The mask is what it was.
	sigset_t mask;
	CHECK(sigprocmask(SIG_BLOCK, NULL, &mask) == 0);
	for (int number = 1; number < 32; number++)
		CHECK(sigismember(&mask, number) == 0);

	// What is ignored does not end a run; what has no handler kills.
	CHECK(signal(SIGALRM, SIG_IGN) == leave);
	CHECK(signal(SIGALRM, SIG_DFL) == SIG_IGN);
	CHECK(signal(SIGALRM, use_vcpu) == SIG_DFL);
	return 0;
}
