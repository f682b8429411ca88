#!/usr/bin/env bash
# Reproduces the drafter in prism_trt/assets: 6,656 greedy answers of SmolLM2-135M-Instruct, then three training stages.
# About two hours on two processor cores. Usage: scripts/train_shipped_drafter.sh PROMPTS.jsonl OUT
set -euo pipefail

prompts=${1:?usage: $0 PROMPTS.jsonl OUT}
out=${2:?usage: $0 PROMPTS.jsonl OUT}
target=$(python -c 'from prism_trt.target.smollm2 import find_smollm2; print(find_smollm2())')

python -m prism_trt.train --target "$target" --data "$prompts" --out "$out" \
    --answers 6656 --max-prompt-tokens 768 --max-new-tokens 256 --sampled-share 0 \
    --rows-per-update 1024 --one-step-updates 7000 --alignment-updates 1000 --tuning-updates 900
