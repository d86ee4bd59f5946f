"""One stage as a Ray job, finetune: the routers, on one or more workers, with all stages before it that are not complete.

A laptop:                 python jobs/finetune.py
A GPU machine or head:    ray job submit -- python jobs/finetune.py --config configs/olmoe.yaml
A cluster elsewhere:      ray job submit --address http://HEAD:8265 --working-dir . -- \
                              python jobs/finetune.py --config configs/olmoe.yaml --storage /mnt/shared

Options are those of `roma-ray finetune`. ray.finetune_workers changes no bit of the result on CPUs.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
