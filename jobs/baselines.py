"""The baselines of Table 1 as a Ray job: every method on the same questions, into one table and one MLflow parent run.

A laptop, no cluster (starts Ray itself):      python jobs/baselines.py
A cluster whose head was started here:         ray job submit -- python jobs/baselines.py --methods roma,router_tuning,oracle
A cluster elsewhere (uploads the code only):   ray job submit --address http://HEAD:8265 --working-dir . -- \
                                                   python jobs/baselines.py --config configs/olmoe.yaml --storage /mnt/shared

Options are those of `roma-ray baselines`: --methods, --seeds, --config, --set, --storage, --summary. The stages up to the
neighborhoods are run first where they are missing. A method that fails is named and leaves the others' rows; the same
command runs what is missing.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["baselines", *sys.argv[1:]])
