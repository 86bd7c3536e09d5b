#!/usr/bin/env bash
# What this project would like to know of a machine with a CUDA GPU; run once, from anywhere:
#
#     benchmarks/gpu_check.sh [MODEL HEADS PROMPTS.jsonl [EAGLE3]]
#
# Without arguments it takes the embedded SmolLM2-135M-Instruct with the shipped heads. EAGLE3 is a folder or Hub id of an
# EAGLE-3 head for MODEL. It installs into .venv-gpu, checks, measures, and packs everything into gpu-check.tar.gz to send
# back; a part that fails is noted there and the next one runs. PYTHON names the interpreter, REPEATS how often to measure.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}" VENV=.venv-gpu OUT=build/gpu-check
BIN="$VENV/bin"
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-INFO}"
rm -rf "$OUT"
mkdir -p "$OUT"

# step NAME COMMAND…: run it, keep what it says in NAME.log, and note how it ended.
step() {
    local name="$1"
    shift
    echo "$name: $*"
    if "$@" >"$OUT/$name.log" 2>&1; then
        echo "ok      $name" >>"$OUT/summary.txt"
    else
        echo "FAILED  $name (exit status $?)" >>"$OUT/summary.txt"
        tail -n 3 "$OUT/$name.log"
    fi
}

step machine nvidia-smi
step venv "$PYTHON" -m venv "$VENV"
step install "$BIN/python" -m pip install -q -e ".[cuda,demo,train,bench,test]"
step versions "$BIN/python" -m pip freeze
step doctor "$BIN/vllm-earlyexit" doctor

# Outputs of self-exit are those of plain vLLM, in float32, on both model runners.
step lossless-v2 env VLLM_USE_V2_MODEL_RUNNER=1 "$BIN/python" -m pytest tests/v2
step sampling-v2 env VLLM_USE_V2_MODEL_RUNNER=1 "$BIN/python" -m pytest tests/engine/test_sampling.py tests/engine/test_statistics.py
step lossless-v1 env VLLM_USE_V2_MODEL_RUNNER=0 "$BIN/python" -m pytest tests/engine/test_lossless.py

# Tokens per second, in bfloat16 and compiled, on the runner that vLLM chooses; it fails where these cannot be believed.
if [ $# -ge 3 ]; then
    model="$1" heads=(--heads "$2") prompts="$3"
else
    model=build/smollm2-135m-instruct heads=() prompts=vllm_earlyexit/assets/demo_prompts.jsonl
    step model "$BIN/python" -c "from pathlib import Path; from vllm_earlyexit.embedded import smollm2; smollm2(Path('$model'))"
fi
configs=(ar self-exit heads-only ngram:2:4)
[ $# -ge 4 ] && configs+=("eagle3:4:$4")
step throughput "$BIN/python" -m benchmarks.throughput --model "$model" ${heads[@]+"${heads[@]}"} --prompts "$prompts" \
    --num-prompts 20 --max-tokens 128 --concurrency 1 8 32 --dtype bfloat16 --repeats "${REPEATS:-5}" --configs "${configs[@]}" --out "$OUT/throughput"

cat "$OUT/summary.txt"
tar -czf gpu-check.tar.gz -C "$(dirname "$OUT")" "$(basename "$OUT")" && echo "gpu-check.tar.gz is what to send back"
! grep -q '^FAILED' "$OUT/summary.txt"
