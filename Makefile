# Twofold's commands. `make help` lists them.

CARGO ?= cargo

.PHONY: help build install run test check unit interleavings conformance hardware hardware-processor hardware-kvm hardware-arm64 hardware-arm64-linux bench bench-build bench-docs bench-instructions model fuzz verify-cpu verify-modes clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build the command and libtwofold.so in release mode
	$(CARGO) build --release --quiet -p twofold -p twofold-preload -p hello -p private -p spp -p tdx

run: build ## run examples/hello on the software KVM and print a summary
	@if [ -e /dev/kvm ]; then \
		echo "This machine has a /dev/kvm of its own; the guest runs on Twofold all the same."; \
	else \
		echo "This machine has no /dev/kvm."; \
	fi
	@target/release/twofold run --summary -- target/release/hello

test: check unit interleavings ## every test of the project: what CI runs
	@$(MAKE) --no-print-directory hardware HARDWARE=--if-available
	@$(MAKE) --no-print-directory hardware-arm64 HARDWARE=--if-available
	@$(MAKE) --no-print-directory conformance

check: ## formatting and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --quiet --workspace --all-targets -- -D warnings

unit: build ## unit, model, documentation and host-comparison tests
	$(CARGO) test --quiet --workspace

interleavings: ## interleavings: loom on the small protocols, shuttle on the whole MMU
	RUSTFLAGS="--cfg loom" CARGO_PROFILE_RELEASE_LTO=off $(CARGO) test --quiet --release \
		-p twofold-table -p twofold-mmu -p twofold-cpu -p twofold-tdx -p twofold-pkvm --lib --target-dir target/loom interleavings
	RUSTFLAGS="--cfg shuttle" CARGO_PROFILE_RELEASE_LTO=off $(CARGO) test --quiet --release \
		-p twofold-mmu --test interleavings --target-dir target/shuttle

conformance: build ## KVM's own selftests, the tests of kvm-ioctls, and guests of Debian's QEMU
	conformance/selfcheck.sh
	conformance/run.sh --if-available

hardware: ## the tables on processors of Bochs and QEMU, and beside KVM's, in a table
	cd hardware && $(CARGO) fmt -p twofold-walks -p twofold-transitions -p twofold-processor -p twofold-hardware-x86 -p twofold-hardware-speed --check
	cd hardware/x86 && env -u RUSTFLAGS $(CARGO) clippy --quiet --target-dir ../../target/hardware -p twofold-hardware-x86 -p twofold-hardware-speed -- -D warnings
	cd hardware && $(CARGO) clippy --quiet --target-dir ../target/hardware -p twofold-walks -p twofold-transitions -p twofold-processor --all-targets -- -D warnings
	cd hardware && $(CARGO) test --quiet --target-dir ../target/hardware -p twofold-walks -p twofold-transitions
	hardware/run.sh $(HARDWARE)

hardware-processor: ## 16-bit modes and privilege on twofold-cpu, beside Bochs
	hardware/processor/run.sh $(HARDWARE)

hardware-kvm: ## what Debian's KVM and Twofold do to their tables while the same program runs
	hardware/kvm/run.sh $(HARDWARE)

hardware-arm64: ## the protected hypervisor and its host on QEMU's arm64 model
	cd hardware/arm64 && $(CARGO) fmt --check
	hardware/arm64/run.sh $(HARDWARE)

hardware-arm64-linux: ## Linux as the host below the hypervisor; the original's tables decoded
	hardware/arm64/linux.sh
	hardware/arm64/original.sh

# The guest that is timed, as a flat image beside the programs that run it.
bench-build: build
	$(CARGO) build --release --quiet -p twofold-bench
	cd hardware/x86 && env -u RUSTFLAGS $(CARGO) build --release --quiet --target-dir ../../target/hardware \
		-p twofold-hardware-speed
	objcopy -O binary target/hardware/x86_64-unknown-linux-gnu/release/twofold-hardware-speed \
		target/release/speed.bin

bench: bench-build ## figures beside what they are compared with; BENCH="zap map" for some of them
	target/release/twofold-bench $(BENCH)

bench-docs: bench-build ## measure, and put the tables into docs/performance.md
	target/release/twofold-bench --markdown > target/bench.md
	(echo; target/release/twofold-bench --instructions --markdown) >> target/bench.md
	awk '/^<!-- end of figures/ { skip = 0 } !skip { print } \
		/^<!-- figures/ { while ((getline line < "target/bench.md") > 0) print line; skip = 1 }' \
		docs/performance.md > target/performance.md
	cp target/performance.md docs/performance.md

bench-instructions: ## instructions instead of time: the same figures on a busy machine
	@command -v valgrind >/dev/null || apt-get install --yes valgrind || \
		{ echo "bench-instructions: install valgrind and try again" >&2; exit 1; }
	$(MAKE) --no-print-directory bench-build
	target/release/twofold-bench --instructions $(BENCH)

model: ## the MMU beside the reference model, more than a million operations
	TWOFOLD_MODEL_CASES=8000 $(CARGO) test --release -p twofold-mmu --test model -- --nocapture

fuzz: ## random ioctl sequences, many of them
	TWOFOLD_FUZZ_CASES=20000 $(CARGO) test --release -p twofold-kvm --test fuzz

verify-cpu: ## every instruction form against the host's processor, at length
	TWOFOLD_JUDGE_CASES=20000 $(CARGO) test --release -p twofold-cpu --test judge -- --nocapture

verify-modes: ## every form of 16-bit code and everything about privilege against Bochs, at length
	TWOFOLD_JUDGE_CASES=$${TWOFOLD_JUDGE_CASES:-50} TWOFOLD_JUDGE_FAMILIES=1 hardware/processor/run.sh

PREFIX ?= /usr/local
install: build ## the command, its library and the C headers, below PREFIX
	install -D target/release/twofold $(DESTDIR)$(PREFIX)/bin/twofold
	install -D -m 644 target/release/libtwofold.so $(DESTDIR)$(PREFIX)/lib/libtwofold.so
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/include/twofold include/twofold/*.h

clean: ## remove everything that was built
	$(CARGO) clean
