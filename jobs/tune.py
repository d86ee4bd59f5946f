"""A grid of trials as a Ray job: shared extraction, Ray Tune, figures and tables. No arguments: the embedded default's grid.

A laptop, no cluster (starts Ray itself):      python jobs/tune.py
A GPU machine, started by `ray start --head`:  ray job submit -- python jobs/tune.py --space configs/ablations.yaml
A cluster elsewhere:                           ray job submit --address http://HEAD:8265 --working-dir . -- \
                                                   python jobs/tune.py --space configs/ablations.yaml --storage s3://BUCKET/roma

Options are those of `roma-ray tune`; --dry-run first says what it will cost. Run it again after a fault: finished trials are
kept. ray.gpus_per_worker: 0.5 puts two trials on a GPU; ray.finetune_workers gives each trial several workers.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
