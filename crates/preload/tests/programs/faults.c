// Faults of the program itself are the program's: its handlers see them, and
// without one it dies of them.
#include "guest.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/wait.h>

static sigjmp_buf elsewhere;
static volatile int calls;
static void *volatile address;

static void handler(int signal, siginfo_t *info, void *context)
{
	sigset_t mask;
	calls++;
	CHECK(info->si_addr == address);
	// The signal itself and what the program asked for are blocked.
	CHECK(sigprocmask(SIG_BLOCK, NULL, &mask) == 0);
	CHECK(sigismember(&mask, signal) == 1);
	CHECK(sigismember(&mask, SIGUSR1) == 1);
	siglongjmp(elsewhere, 1);
	(void)context;
}

static void fault(int expected_calls)
{
	address = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(address != MAP_FAILED);
	if (sigsetjmp(elsewhere, 1) == 0) {
		*(volatile char *)address = 1;
		CHECK(!"the store should have faulted");
	}
	CHECK(calls == expected_calls);
}

static void install(void)
{
	struct sigaction action = { .sa_sigaction = handler,
				    .sa_flags = SA_SIGINFO };
	struct sigaction old;
	sigaddset(&action.sa_mask, SIGUSR1);
	CHECK(sigaction(SIGSEGV, &action, &old) == 0);
}

static int death_of(void (*deed)(void))
{
	int status;
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		deed();
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void store_to_nowhere(void)
{
	signal(SIGSEGV, SIG_DFL);
	*(volatile char *)8 = 1;
}

static void ignore_and_store(void)
{
	signal(SIGSEGV, SIG_IGN);
	*(volatile char *)8 = 1;
}

static void send(void)
{
	signal(SIGSEGV, SIG_DFL);
	kill(getpid(), SIGSEGV);
}

static void ignore_and_send(void)
{
	signal(SIGSEGV, SIG_IGN);
	kill(getpid(), SIGSEGV);
}

int main(void)
{
	install();
	spinning_guest();
	struct sigaction seen;
	CHECK(sigaction(SIGSEGV, NULL, &seen) == 0);
	CHECK(seen.sa_sigaction == handler && seen.sa_flags & SA_SIGINFO);
	fault(1);
	install();
	fault(2);

	CHECK(death_of(store_to_nowhere) == SIGSEGV);
	CHECK(death_of(ignore_and_store) == SIGSEGV);
	CHECK(death_of(send) == SIGSEGV);
	CHECK(death_of(ignore_and_send) == 0);
	return 0;
}
