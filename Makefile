# `make help` lists the targets. Each first installs what it needs and the machine lacks
# (scripts/setup); where nothing is missing that costs a moment.

CARGO ?= cargo
# For instance CARGO_FLAGS=--locked.
CARGO_FLAGS ?=
PREFIX ?= /usr/local
DESTDIR ?=
# Where libfabric's headers are, for `make bindings`.
INCLUDE_DIR ?= /usr/include

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET_DIR)/release/mooncake-efa
SOFTEFA := $(TARGET_DIR)/release/softefa
SOAK := $(TARGET_DIR)/release/soak
# What `make build` builds.
PROGRAMS := -p mooncake-efa-capi -p transfer-engine -p mooncake-efa-cli -p softefa -p softefa-preload
# The emulated devices of this checkout's tests.
EFA_DIR := /dev/shm/mefa-test-$(shell pwd | cksum | cut -d' ' -f1)
ENV := . scripts/env &&

.DEFAULT_GOAL := build
.PHONY: build demo test test-mooncake test-gpu soak fuzz sanitize bench lint header bindings install clean help bench-programs cmake

build: ## the libraries and the commands, in target/release
	@scripts/setup build
	$(ENV) $(CARGO) build $(CARGO_FLAGS) --release $(PROGRAMS)

demo: build ## move and verify memory between two processes, over shared memory and over TCP
	$(BIN) bench --self --provider shm --verify --duration 3
	$(BIN) bench --self --provider tcp --verify --duration 3

test: ## every test: Rust, C, C++, and consumers of the CMake package
	@scripts/setup build test
	@$(MAKE) --no-print-directory build
	@# Which tests preload.
	$(ENV) $(CARGO) build $(CARGO_FLAGS) --profile quick -p softefa -p softefa-preload -p soak
	$(ENV) $(CARGO) test $(CARGO_FLAGS) --profile quick --workspace
	bench/test
	@# The engine's concurrent parts and the emulator's ring, in every order that threads can come in.
	$(ENV) RUSTFLAGS='--cfg loom' CARGO_TARGET_DIR=$(TARGET_DIR)/loom \
		$(CARGO) test $(CARGO_FLAGS) --profile quick -p mooncake-efa -p softefa --lib -- models loom_tests
	@# The same between processes on an emulated EFA device, with libfabric's real efa provider.
	$(ENV) $(SOFTEFA) run --dir $(EFA_DIR) -- $(CARGO) test $(CARGO_FLAGS) --profile quick --workspace --test doors efa
	$(ENV) MEFA_TEST_PROVIDERS=efa $(SOFTEFA) run --dir $(EFA_DIR) -- \
		$(CARGO) test $(CARGO_FLAGS) --profile quick --workspace --test cli
	@# What is discovered on each kind of host.
	for host in '--nics 4' '--profile p4d' '--profile p5' '--profile p5en' '--profile p6-b200' '--profile p6-b300'; do \
		rm -rf $(EFA_DIR); $(ENV) $(SOFTEFA) run --dir $(EFA_DIR) $$host -- \
			$(CARGO) test $(CARGO_FLAGS) --profile quick --workspace --test discovery efa || exit 1; done
	@rm -rf $(EFA_DIR)
	@# The same under faults, a minute of it.
	$(TARGET_DIR)/quick/soak --minutes 1
	@$(MAKE) --no-print-directory cmake CMAKE_ARGS=-DMOONCAKE_EFA_BUILD_TESTS=ON
	@# Most of them wait most of the time.
	cd build && ctest --output-on-failure -j 8

test-mooncake: build ## the published Mooncake with our transport in it; PYTEST_ARGS='-k store'
	@scripts/setup mooncake
	$(ENV) cmake -S . -B build -DMOONCAKE_EFA_BUILD_SWAP=ON -DMOONCAKE_EFA_BUILD_TESTS=OFF
	$(ENV) cmake --build build --target mooncake_efa_swap
	@# Files beside each other: most tests wait for another process.
	.tools/mooncake/bin/pytest tests/mooncake -n 4 --dist loadfile $(PYTEST_ARGS)
	@# Our client of the wheel's HTTP metadata server.
	$(ENV) MEFA_TEST_MOONCAKE=1 $(CARGO) test $(CARGO_FLAGS) --profile quick --workspace --test stores wheel

test-gpu: ## GPU memory, on the GPUs of this machine; GPU_ARGS='--gtest_filter=*/tcp*', see scripts/test-gpu
	@scripts/test-gpu $(GPU_ARGS)

fuzz: ## the fuzz targets, FUZZ_SECONDS (60) each; see docs/fuzzing.md
	@scripts/setup fuzz
	$(ENV) scripts/fuzz

sanitize: ## the tests under AddressSanitizer and ThreadSanitizer; see docs/fuzzing.md
	@scripts/setup build test
	$(ENV) scripts/sanitize

soak: build ## faults on emulated devices, every byte checked, 10 minutes; SOAK_ARGS='--minutes 1 --only errors', docs/faults.md
	$(ENV) $(CARGO) build $(CARGO_FLAGS) --release -p soak
	$(SOAK) $(SOAK_ARGS)

bench: build bench-programs ## raw loop, ours, and Mooncake's C++ transport; BENCH_ARGS='--quick', see bench/run --help
	bench/run --out bench/out/bench.json $(BENCH_ARGS)
	$$([ -x .tools/bench/bin/python ] && echo .tools/bench/bin/python || echo python3) \
		bench/report --plots bench/out --markdown bench/out/report.md bench/out/bench.json

bench-programs: # raw_rma, c_abi and gpu_copy, in build/bench
	@scripts/setup bench
	@mkdir -p build/bench
	PKG_CONFIG_PATH="$$PKG_CONFIG_PATH:/opt/amazon/efa/lib/pkgconfig:/opt/amazon/efa/lib64/pkgconfig" \
	sh -c 'cc -std=gnu11 -O2 -Wall -Wextra -pthread -o build/bench/raw_rma bench/raw_rma.c \
		$$(pkg-config --cflags --libs libfabric) -Wl,--enable-new-dtags,-rpath,$$(pkg-config --variable=libdir libfabric)'
	@# By the name that the loader looks for, beside the program.
	cp $(TARGET_DIR)/release/libmooncake_efa.so build/bench/libmooncake_efa.so.0
	cc -std=gnu11 -O2 -Wall -Wextra -pthread -Iinclude -o build/bench/c_abi bench/c_abi.c \
		build/bench/libmooncake_efa.so.0 -Wl,--enable-new-dtags,-rpath,'$$ORIGIN'
	cc -std=gnu11 -O2 -Wall -Wextra -o build/bench/gpu_copy bench/gpu_copy.c -ldl

lint: build ## formatting, clippy, that header, symbols, ABI and `unsafe` are as they should be, and a request's cost
	@scripts/setup lint header
	$(ENV) $(CARGO) fmt --all --check
	$(ENV) $(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	scripts/check-header
	scripts/check-symbols $(TARGET_DIR)/release
	scripts/check-abi
	scripts/check-unsafe
	$(ENV) scripts/check-cost

header: ## include/mooncake_efa.h from capi/
	@scripts/setup header
	scripts/header

bindings: ## src/fabric/bindings.rs from libfabric's headers in INCLUDE_DIR
	scripts/bindings $(INCLUDE_DIR)

cmake:
	$(ENV) cmake -S . -B build $(CMAKE_ARGS)
	$(ENV) cmake --build build -j $$(nproc)

install: build ## to PREFIX (/usr/local), below DESTDIR if set
	@$(MAKE) --no-print-directory cmake \
		CMAKE_ARGS='-DMOONCAKE_EFA_BUILD_TESTS=OFF -DCMAKE_INSTALL_PREFIX="$(PREFIX)"'
	DESTDIR="$(DESTDIR)" cmake --install build

clean: ## what was built; .tools/ stays
	rm -rf build bench/out
	$(ENV) $(CARGO) clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 15
