#!/usr/bin/env bash
# Compares drafters for SmolLM2-135M-Instruct that had equal data and equal updates, several training seeds each, and
# measures what each choice of PRISM gives. All arms end annealed. HASS and PRISM start from one warm-up, which is EAGLE
# training. Every step is skipped when its result is there, so an interrupted run continues.
#
# Usage: scripts/compare_drafters.sh PROMPTS.jsonl BENCH_SETS WORK     (BENCH_SETS/*/question.jsonl are the question sets)
# Environment: SEEDS "0 1", WARM_UPDATES 1400, TUNED_UPDATES 600, ANSWERS 4096, SIZES "1024 2048 4096" (data sizes),
# PARTS "main compute ablations sizes" (compute: equal computation instead of equal updates), PER_SET 80, TRAIN_OPTIONS
# (such as "--device cuda"), WORKERS 1 (trainings at a time), ABLATIONS (some of the names in `ablation`).
set -euo pipefail

usage="usage: $0 PROMPTS.jsonl BENCH_SETS WORK"
prompts=${1:?$usage} sets=${2:?$usage} work=${3:?$usage}
seeds=${SEEDS:-0 1} warm=${WARM_UPDATES:-1400} tuned=${TUNED_UPDATES:-600} answers=${ANSWERS:-4096}
sizes=${SIZES:-1024 2048 4096} parts=${PARTS:-main compute ablations sizes} per_set=${PER_SET:-80} workers=${WORKERS:-1}
ablations=${ABLATIONS:-m1 m3 current aligned steps-2 steps-6 lr no-hidden hass-lr}
read -ra options <<<"${TRAIN_OPTIONS:-}"
target=$(python -c 'from prism_trt.target.smollm2 import find_smollm2; print(find_smollm2())')

train() { # NAME SEED FROM OPTIONS...: FROM is the arm whose first stage this one continues, or -
    local name=$1 seed=$2 from=$3 checkpoints="$work/$1-$2/checkpoints"
    shift 3
    [ -f "$work/$name-$seed/drafter/config.json" ] && return
    mkdir -p "$checkpoints"
    [ "$from" = - ] || cp -n "$work/$from-$seed/checkpoints/stage-0-one_step.pt" "$checkpoints/"
    python -m prism_trt.train --target "$target" --cache "$work/cache" --seed "$seed" --overwrite "${options[@]}" \
        --out "$work/$name-$seed/drafter" --work "$checkpoints" "$@"
}

prism() { # NAME SEED FROM OPTIONS...: PRISM after the warm-up
    local name=$1 seed=$2 from=$3
    shift 3
    train "$name" "$seed" "$from" --kind prism --one-step-updates "$warm" --alignment-updates 0 --tuning-updates "$tuned" \
        --tuning-hidden-weight 1 "$@"
}

ablation() { # NAME SEED: PRISM, or HASS, with one thing changed
    local seed=$2
    case $1 in
        m1) prism m1 "$seed" warm --modules 1 ;;
        m3) prism m3 "$seed" warm --modules 3 ;;
        current) prism current "$seed" warm --kv-mode current ;;
        aligned)
            train aligned "$seed" warm --kind prism --one-step-updates "$warm" \
                --alignment-updates $((tuned / 2)) --tuning-updates $((tuned / 2)) --tuning-hidden-weight 1
            ;;
        steps-2) prism steps-2 "$seed" warm --tuning-steps 2 --tuning-updates $((2 * tuned)) ;; # of equal computation
        steps-6) prism steps-6 "$seed" warm --tuning-steps 6 ;;
        lr) prism lr "$seed" warm --tuning-lr 0.001 ;;
        no-hidden) prism no-hidden "$seed" warm --tuning-hidden-weight 0 ;;
        hass-lr) train hass-lr "$seed" warm "${hass[@]}" --alignment-lr 0.001 ;;
        *) echo "error: there is no ablation $1" >&2 && return 2 ;;
    esac
}

seed_of_everything() { # SEED: all arms of one training seed
    local seed=$1 size name
    local hass=(--kind hass --one-step-updates "$warm" --alignment-updates "$tuned")
    train warm "$seed" - --kind eagle2 --one-step-updates "$warm"
    prism prism "$seed" warm
    if [[ $parts == *main* || $parts == *compute* ]]; then
        train hass "$seed" warm "${hass[@]}"
    fi
    if [[ $parts == *compute* ]]; then
        # An update of alignment or tuning costs as much as --alignment-steps or --tuning-steps updates of one step.
        train eagle2-equal-compute "$seed" - --kind eagle2 --one-step-updates $((warm + 4 * tuned))
    fi
    if [[ $parts == *main* ]]; then
        train eagle2 "$seed" - --kind eagle2 --one-step-updates $((warm + tuned))
        train warm-multi "$seed" - --kind eagle2 --features multi --one-step-updates "$warm"
        prism prism-star "$seed" warm-multi --features multi
        train standard "$seed" - --kind standard --one-step-updates $((warm + tuned))
    fi
    if [[ $parts == *ablations* ]]; then
        for name in $ablations; do ablation "$name" "$seed"; done
    fi
    if [[ $parts == *sizes* ]]; then
        for size in $sizes; do
            train "warm-$size" "$seed" - --kind eagle2 --one-step-updates "$warm" --max-answers "$size"
            train "hass-$size" "$seed" "warm-$size" "${hass[@]}" --max-answers "$size"
            prism "prism-$size" "$seed" "warm-$size" --max-answers "$size"
        done
    fi
}

bench() { # RESULT REFERENCE TREE,... OPTIONS NAME=ARM...: results of the named arms, all seeds
    local result=$1 reference=$2 trees=$3 arguments=() pair arm seed value
    read -ra arguments <<<"$4"
    shift 4
    for pair in "$@"; do
        for seed in $seeds; do
            arm="$work/${pair#*=}-$seed"
            [ -f "$arm/engine/engine.json" ] || python -m prism_trt.build --target "$target" --drafter "$arm/drafter" \
                --out "$arm/engine" --slots 8 --overwrite
            arguments+=(--engine "${pair%%=*}=$arm/engine")
        done
    done
    for value in ${trees//,/ }; do arguments+=(--tree "$value"); done
    python -m prism_trt.bench "${arguments[@]}" --questions "$sets"/*/question.jsonl --per-set "$per_set" \
        --max-new-tokens 64 --batch 8 --reference "$reference" --json "$work/$result.json" \
        --markdown "$work/$result.md" --plots "$work/$result-plots"
}

python -m prism_trt.train --target "$target" --data "$prompts" --cache "$work/cache" --generate-only --features multi \
    --answers "$answers" --max-prompt-tokens 768 --max-new-tokens 256 --sampled-share 0
running=()
for seed in $seeds; do
    if [ "${#running[@]}" -ge "$workers" ]; then
        wait "${running[0]}"
        running=("${running[@]:1}")
    fi
    seed_of_everything "$seed" &
    running+=("$!")
done
for process in "${running[@]}"; do wait "$process"; done

if [[ $parts == *main* ]]; then
    arms=(eagle2=eagle2 hass=hass prism=prism "prism*=prism-star" standard=standard)
    bench comparison hass 16/4/6,60/10/6 --replay "${arms[@]}"
    bench comparison-sampled hass 16/4/6 "--temperature 1" "${arms[@]}"
fi
if [[ $parts == *compute* ]]; then
    bench equal-compute eagle2 16/4/6,60/10/6 --replay eagle2=eagle2-equal-compute hass=hass prism=prism
fi
if [[ $parts == *ablations* ]]; then
    arms=(prism=prism)
    for name in $ablations; do arms+=("$name=$name"); done
    bench ablations prism 16/4/6 --replay "${arms[@]}"
fi
if [[ $parts == *sizes* ]]; then
    points=()
    for size in $sizes; do
        bench "size-$size" hass 16/4/6 --replay "hass=hass-$size" "prism=prism-$size"
        points+=(--point "$size=$work/size-$size.json")
    done
    python -m prism_trt.bench.scaling "${points[@]}" --plot "$work/scaling.png" --markdown "$work/scaling.md"
fi
