#!/usr/bin/env bash
# Trains EAGLE-2, HASS and PRISM drafters for SmolLM2-135M-Instruct with equal data and equal updates, two seeds each, and
# compares their acceptance lengths. Every arm ends annealed; HASS and PRISM start from the same warm-up, which is EAGLE
# training. Four to five hours on two processor cores. Usage: scripts/compare_drafters.sh PROMPTS.jsonl BENCH_SETS WORK
# (BENCH_SETS/*/question.jsonl are the question sets).
set -euo pipefail

prompts=${1:?usage: $0 PROMPTS.jsonl BENCH_SETS WORK}
sets=${2:?usage: $0 PROMPTS.jsonl BENCH_SETS WORK}
work=${3:?usage: $0 PROMPTS.jsonl BENCH_SETS WORK}
warm=${WARM_UPDATES:-1400} tuned=${TUNED_UPDATES:-600}
target=$(python -c 'from prism_trt.target.smollm2 import find_smollm2; print(find_smollm2())')

train() { # NAME SEED OPTIONS...
    local name=$1 seed=$2
    shift 2
    [ -f "$work/$name-$seed/drafter/config.json" ] && return
    python -m prism_trt.train --target "$target" --cache "$work/cache" --seed "$seed" --overwrite \
        --out "$work/$name-$seed/drafter" --work "$work/$name-$seed/checkpoints" "$@"
}

continue_from_warm_up() { # NAME SEED: the checkpoint at the end of stage one_step
    mkdir -p "$work/$1-$2/checkpoints"
    cp -n "$work/warm-$2/checkpoints/stage-0-one_step.pt" "$work/$1-$2/checkpoints/"
}

python -m prism_trt.train --target "$target" --data "$prompts" --cache "$work/cache" --generate-only --features multi \
    --answers 4096 --max-prompt-tokens 768 --max-new-tokens 256 --sampled-share 0
engines=()
for seed in 0 1; do
    train warm "$seed" --kind eagle2 --one-step-updates "$warm"
    continue_from_warm_up hass "$seed"
    train hass "$seed" --kind hass --one-step-updates "$warm" --alignment-updates "$tuned"
    continue_from_warm_up prism "$seed"
    train prism "$seed" --kind prism --one-step-updates "$warm" \
        --alignment-updates $((tuned / 2)) --tuning-updates $((tuned / 2))
    train eagle2 "$seed" --kind eagle2 --one-step-updates $((warm + tuned))
    for name in eagle2 hass prism; do
        python -m prism_trt.build --target "$target" --drafter "$work/$name-$seed/drafter" \
            --out "$work/$name-$seed/engine" --slots 8 --overwrite
        engines+=(--engine "$name=$work/$name-$seed/engine")
    done
done

python -m prism_trt.bench "${engines[@]}" --questions "$sets"/*/question.jsonl --per-set 40 --max-new-tokens 64 \
    --tree 16/4/6 --batch 8 --reference hass --json "$work/comparison.json" --markdown "$work/comparison.md" \
    --plots "$work/plots"
