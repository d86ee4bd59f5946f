"""One stage as a Ray job, extract: routing weights, answers and activations of every question, in one pass on all GPUs.

A laptop:                 python jobs/extract.py
A GPU machine or head:    ray job submit -- python jobs/extract.py --config configs/olmoe.yaml
A cluster elsewhere:      ray job submit --address http://HEAD:8265 --working-dir . -- \
                              python jobs/extract.py --config configs/olmoe.yaml --storage /mnt/shared

Options are those of `roma-ray extract`.
One process a GPU; ray.extract_workers, ray.gpus_per_worker and extraction.batch_tokens set how many and how full.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["extract", *sys.argv[1:]])
