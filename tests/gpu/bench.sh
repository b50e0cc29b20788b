#!/bin/sh
# mooncake-efa bench with GPU memory on the fake driver, every byte checked: bench.sh MOONCAKE_EFA LIBCUDA_DIR PROVIDER
set -u
program=$1 provider=$3
export LD_LIBRARY_PATH="$2${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" FAKE_CUDA_DEVICES=2
unset CUDA_VISIBLE_DEVICES
said=$(mktemp)
trap 'rm -f "$said"' EXIT

fail() {
    echo "bench $*"
    cat "$said"
    exit 1
}

# A bench of a second with these flags, and where its memory has to be.
verified() {
    place=$1
    shift
    "$program" bench --self --provider "$provider" --duration 1 --buffer_size 8M --verify "$@" >"$said" 2>&1 ||
        fail "$@"
    grep -q 'verified .* bytes, 0 wrong' "$said" || fail "$@: not verified"
    grep -q "memory  *$place\$" "$said" || fail "$@: not $place"
    echo "$place: $*"
}

for way in 'write' 'read --same_process'; do
    flags="--operation $way --batch_size 8 --threads 2"
    # shellcheck disable=SC2086
    verified 'initiator cuda:0, target cuda:0' $flags --use_vram
    # shellcheck disable=SC2086
    verified 'initiator cuda:1, target cuda:0' $flags --use-vram --gpu-id=1 --target-gpu-id=0
    # shellcheck disable=SC2086
    verified 'initiator host, target cuda:1' $flags --use_vram --gpu_id=1 --vram_side target
    # shellcheck disable=SC2086
    verified 'initiator cuda:0, target host' $flags --use_vram --vram_side initiator
done
# Threads share two buffers of ours, and one of the target's.
verified 'initiator cuda:0, cuda:1, target cuda:0, cuda:1' --use_vram --gpu_id=-1 --threads 3 --batch_size 8
verified 'initiator cuda:0, cuda:1, target cuda:1' --use_vram --gpu_id=-1 --target_gpu_id=1 --threads 3 --batch_size 8 \
    --same_process
# Longer than what is staged at a time.
verified 'initiator cuda:0, target host' --use_vram --vram_side initiator --threads 1 --block_size 3M --batch_size 2 \
    --operation write

# No such GPU: one line, and nothing begins.
"$program" bench --self --provider "$provider" --use_vram --gpu_id=2 >"$said" 2>&1
[ $? = 2 ] || fail "--gpu_id=2: exit status"
[ "$(cat "$said")" = "mooncake-efa: --use_vram: there is no GPU 2; this process sees 2, numbered from 0 \
(CUDA_VISIBLE_DEVICES chooses and numbers them)" ] || fail "--gpu_id=2"
# What CUDA refuses is told with the GPU.
FAKE_CUDA_FAIL=cuMemAlloc=2 "$program" bench --self --same_process --provider "$provider" --use_vram >"$said" 2>&1
[ $? = 1 ] && grep -q 'on CUDA device 0.*CUDA_ERROR_OUT_OF_MEMORY' "$said" || fail "without memory"

# Who does not ask for a GPU does not even load CUDA.
LD_DEBUG=files "$program" bench --self --provider "$provider" --duration 1 --buffer_size 8M --batch_size 8 --threads 1 \
    >"$said" 2>&1 ||
    fail "on the host"
grep -q 'calling init: .*/libc\.so' "$said" || fail "on the host: the loader says nothing"
if grep -q 'calling init: .*/libcuda\.so' "$said"; then fail "on the host: CUDA was loaded"; fi
