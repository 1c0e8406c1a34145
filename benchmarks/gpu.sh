#!/usr/bin/env bash
# All that needs a GPU, in one command: the gpu tests, the benchmarks on CUDA, and a training run that is scored.
#     benchmarks/gpu.sh OUT [IMAGES]
# OUT receives small JSON, PNG and log files; IMAGES is a folder of images (none: digits). PYTHON names the interpreter.
# SECONDS_TRAINING bounds the training run: it is stopped as a scheduler would stop it, and what it reached is scored.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=${1:?usage: benchmarks/gpu.sh OUT [IMAGES]}
images=${2:-}
python=${PYTHON:-python3}
run=${RUN_DIR:-/tmp/ddpm_ema_gpu_run}
mkdir -p "$out"
failed=0

step() {  # step NAME COMMAND...: runs it, keeps the end of what it said, goes on after a failure
    local name=$1; shift
    echo "== $name"
    "$@" > >(tail -c 200000 > "$out/$name.log") 2>&1 || { echo "   failed with exit code $?"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$out/gpu.csv"
step tests "$python" -m pytest -m gpu -q
for name in averaging train_step sampling; do
    step "bench_$name" "$python" "benchmarks/$name.py" --device cuda --output "$out/$name.cuda.json"
done

config=(--config configs/digits.yaml)
if [ -n "$images" ]; then
    config=(--config configs/image_folder.yaml --data.path "$images" --training.mixed_precision bf16 --training.compile true
        --model.block_out_channels 128 256 256 256 --model.attention false true false false --model.layers_per_block 2 --model.norm_num_groups 32
        --training.batch_size 128 --training.learning_rate 2e-4 --checkpoints.every 2000 --checkpoints.snapshots_every 1000
        --evaluation.extractors classifier --evaluation.mixed_precision bf16 --evaluation.batch_size 1000)
fi
config+=(--output-dir "$run")
step features "$python" scripts/train_features.py "${config[@]}"
echo "== train"
timeout --signal=TERM "${SECONDS_TRAINING:-900}" "$python" scripts/train.py "${config[@]}" > >(tail -c 200000 > "$out/train.log") 2>&1
code=$?
[ "$code" = 0 ] || [ "$code" = 75 ] || [ "$code" = 124 ] || { echo "   failed with exit code $code"; failed=1; }
step score "$python" scripts/sample_and_score.py "${config[@]}"
step report "$python" scripts/report.py "$run"
find "$run/scores" -name results.json -exec cp {} "$out/results.json" \;
find "$run/scores" -name grid.png -exec cp {} "$out/grid.png" \;
cp "$run/metrics.jsonl" "$run/report.html" "$out/" 2> /dev/null
exit "$failed"
