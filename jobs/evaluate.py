"""One stage as a Ray job, evaluate: base and tuned routers on the same questions, with all stages before it that are not complete.

A laptop:                 python jobs/evaluate.py
A GPU machine or head:    ray job submit -- python jobs/evaluate.py --config configs/olmoe.yaml
A cluster elsewhere:      ray job submit --address http://HEAD:8265 --working-dir . -- \
                              python jobs/evaluate.py --config configs/olmoe.yaml --storage /mnt/shared

Benchmarks by lm-eval:    ray job submit -- python jobs/evaluate.py --config configs/olmoe.yaml --tasks arc_challenge,hellaswag

Options are those of `roma-ray evaluate`. Complete stages are skipped, so this is cheap after jobs/finetune.py.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
