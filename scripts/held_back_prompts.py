"""Draws prompts that a training run never answered, in the format of question sets.

``python scripts/held_back_prompts.py --target GGUF --data prompts.jsonl --answered 0:6656 --count 60 --out held.jsonl``
leaves out the prompts that ``python -m prism_trt.train --data prompts.jsonl --answer-seed 0 --answers 6656`` answers.
``--answered`` may be repeated, for several runs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from prism_trt.config import GenerationConfig
from prism_trt.data.prompts import PromptConfig, prepare_prompts
from prism_trt.data.reading import read_records
from prism_trt.data.regenerate import plan_generation
from prism_trt.manifest import atomic_file
from prism_trt.target.loading import load_target
from prism_trt.target.tokenizer import TRAINING_DATE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--answered", action="append", default=[], metavar="SEED:ANSWERS")
    parser.add_argument("--max-prompt-tokens", type=int, default=768)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    target = load_target(arguments.target)
    tokenizer = target.tokenizer.dated(TRAINING_DATE)
    prompts, _ = prepare_prompts(arguments.data, target.tokenizer, arguments.max_prompt_tokens, PromptConfig())
    answered: set[tuple[int, ...]] = set()
    for seed, answers in (map(int, text.split(":")) for text in arguments.answered):
        plan = plan_generation(prompts, GenerationConfig(answer_seed=seed), target, ())
        indices = (index for shard in plan.first(answers).values() for index in shard)
        answered.update(tuple(plan.prompts[index]) for index in indices)
    free = {tuple(prompt) for prompt in prompts} - answered
    texts = [conversation.turns[0].user for conversation in read_records(arguments.data).conversations]
    random.Random(arguments.seed).shuffle(texts)
    drawn: list[str] = []
    for text in texts:
        if len(drawn) < arguments.count:
            ids = tuple(tokenizer.encode_chat([{"role": "user", "content": text}]))
            if ids in free:
                free.remove(ids)
                drawn.append(text)
    with atomic_file(arguments.out) as temporary:
        lines = [
            json.dumps({"question_id": i, "category": "held_back", "turns": [text]}) for i, text in enumerate(drawn)
        ]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(answered)} prompts answered, {len(drawn)} of the others in {arguments.out}")


if __name__ == "__main__":
    main()
