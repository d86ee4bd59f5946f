"""Make the embedded default (a small OLMoE model, its tokenizer and question suite) from a fixed seed.

    python jobs/make_demo_assets.py --out roma_ray/assets

Costs about 10 minutes on 2 CPU cores and 2 GB of memory; needs no network. A killed run continues where its last
checkpoint in --work was. `--steps 30` makes a quick, useless model to try the script with.
"""

import argparse
import dataclasses
from pathlib import Path

from demo_assets.assemble import build
from demo_assets.pretrain import Recipe


def main() -> None:
    """Parse the command line and make the assets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, for example roma_ray/assets")
    parser.add_argument("--work", type=Path, default=Path("demo-assets-work"), help="folder of the resumable run")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    arguments = parser.parse_args()
    print(build(arguments.out, arguments.work, dataclasses.replace(Recipe(), steps=arguments.steps)))


if __name__ == "__main__":
    main()
