"""Where the time of drafter training goes: share of matrix products, stage by stage.

``python scripts/profile_training.py --target DIR|GGUF --cache CACHE [--kind prism] [--features last]`` runs a few
updates of every stage under PyTorch's profiler and prints the costliest operators.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from prism_trt.config import TrainConfig
from prism_trt.data.feature_cache import FeatureCache
from prism_trt.target.loading import load_target
from prism_trt.train.loop import Trainer
from prism_trt.train.stages import stages

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--kind", default="prism")
    parser.add_argument("--features", default="last")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = TrainConfig(kind=arguments.kind, features=arguments.features)
    target = load_target(arguments.target)
    trainer = Trainer(target, FeatureCache(arguments.cache, target, config.features), config, Path())
    for stage in stages(config):
        trainer.probe(stage)  # allocations and thread pools are there from here on
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            rate = trainer.probe(stage, arguments.updates)
        averages = sorted(profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
        total = sum(entry.self_cpu_time_total for entry in averages)
        products = sum(entry.self_cpu_time_total for entry in averages if entry.key in MATRIX_PRODUCTS)
        print(f"{stage.name}: {rate:,.0f} rows/s, matrix products {products / total:.0%}")
        for entry in averages[:10]:
            print(f"    {entry.self_cpu_time_total / total:6.1%}  {entry.key}")


if __name__ == "__main__":
    main()
