#!/usr/bin/env bash
# Everything that is to be seen on a GPU, once, from the repository root, in at most nine minutes:
#     bash tests/benchmarks/gpu_acceptance.sh [FOLDER]
#     DEVICE=cpu TINY=1 bash tests/benchmarks/gpu_acceptance.sh        # does it run?
# Needs torch, pytest, transformers and what zoscope's core needs; nothing is installed. FOLDER (default: gpu-acceptance)
# gets a log and JSON of every part. A part that fails or takes too long does not stop the others; the exit status says
# whether all were good.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-gpu-acceptance}
device=${DEVICE:-cuda}
tiny=${TINY:+--tiny}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 most=$2 began=$SECONDS
    shift 2
    echo "== $name: $*"
    if timeout "$most" "$@" 2>&1 | tee "$out/$name.log"; then
        echo "== $name: done in $((SECONDS - began)) s"
    else
        echo "== $name: FAILED after $((SECONDS - began)) s"
        failed+=("$name")
    fi
}

paper() { # the paper's CNN, four layers of 32 channels, on 1,000 images: the edge of stability
    local sets=(--set network=cnn --set classes=10 --set width=32 --set examples=1000 --device "$device")
    "$python" -m zoscope bounds examples/experiments/vision.py "${sets[@]}" --optimizer gd &&
        "$python" -m zoscope track examples/experiments/vision.py "${sets[@]}" --optimizer zo-gd --lr 0.005 --steps 500 \
            --every 250 --run "$out/paper"
}

{
    date -u
    git log -1 --format='%h %s' 2>/dev/null
    nvidia-smi 2>/dev/null
    "$python" -c 'import torch, platform; print(torch.__version__, platform.processor(), torch.cuda.is_available())'
    part tests 150 "$python" -m pytest -q -p no:cacheprovider -m gpu tests
    part answers 150 "$python" tests/benchmarks/gpu_answers.py --device "$device" $tiny --json "$out/answers.json"
    part forward 120 "$python" tests/benchmarks/bench_gpu.py --device "$device" $tiny --only hvp forward --json "$out/gpu.json"
    part peers 90 "$python" tests/benchmarks/bench_gpu.py --device "$device" $tiny --only peers --json "$out/peers.json"
    [ -n "$tiny" ] || part paper 30 bash -c "$(declare -f paper); python=$python device=$device out=$out paper"
    if [ ${#failed[@]} -eq 0 ]; then echo "All parts are good."; else echo "Failed: ${failed[*]}"; fi
    exit ${#failed[@]}
} > >(tee "$out/log.txt") 2>&1
