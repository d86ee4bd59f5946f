"""One stage as a Ray job, embed: the task embeddings E(x_i).

A laptop:                 python jobs/embed.py
A GPU machine or head:    ray job submit -- python jobs/embed.py --config configs/olmoe.yaml
A cluster elsewhere:      ray job submit --address http://HEAD:8265 --working-dir . -- \
                              python jobs/embed.py --config configs/olmoe.yaml --storage /mnt/shared

Options are those of `roma-ray embed`. CPU or GPU; ray.embed_workers sets how many processes.
"""

import sys
from pathlib import Path

# Runs from a checkout, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from roma_ray.cli import main

if __name__ == "__main__":
    main(["embed", *sys.argv[1:]])
