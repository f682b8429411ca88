#!/usr/bin/env bash
# Reproduces the drafter in prism_trt/assets: three training stages on 6,656 greedy answers of SmolLM2-135M-Instruct, then
# more tuning on 4,096 others. About four hours on two processor cores.
# Usage: scripts/train_shipped_drafter.sh PROMPTS.jsonl OUT
set -euo pipefail

prompts=${1:?usage: $0 PROMPTS.jsonl OUT}
out=${2:?usage: $0 PROMPTS.jsonl OUT}
target=$(python -c 'from prism_trt.target.smollm2 import find_smollm2; print(find_smollm2())')
common=(--target "$target" --data "$prompts" --max-prompt-tokens 768 --max-new-tokens 256 --sampled-share 0)

[ -f "$out.first/config.json" ] || python -m prism_trt.train "${common[@]}" --out "$out.first" --answers 6656 \
    --rows-per-update 1024 --one-step-updates 7000 --alignment-updates 1000 --alignment-lr 0.001 --tuning-updates 900
python -m prism_trt.train "${common[@]}" --out "$out" --answers 4096 --answer-seed 1 --init "$out.first" \
    --rows-per-update 512 --one-step-updates 0 --alignment-updates 0 --tuning-updates 2400 --tuning-hidden-weight 1
