"""The whole method as a Ray job: extract, embed, neighbors, finetune, evaluate. No arguments: the embedded default.

A laptop, no cluster (starts Ray itself):      python jobs/full_pipeline.py
A cluster whose head was started here:         ray job submit -- python jobs/full_pipeline.py
A cluster elsewhere (uploads the code only):   ray job submit --address http://HEAD:8265 --working-dir . -- \
                                                   python jobs/full_pipeline.py --config configs/olmoe.yaml --storage s3://BUCKET/roma
One GPU machine, started by `ray start --head`: ray job submit -- python jobs/full_pipeline.py --config configs/olmoe.yaml

Options are those of `roma-ray run`: --config, --set finetune.regularizer.weight=0.5, --storage (a bucket, or a path that every node sees),
--summary. Run it again after a fault: finished work is kept. With authentication, set RAY_AUTH_MODE=token (or disabled) both
where `ray start` and where `ray job submit` run.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
