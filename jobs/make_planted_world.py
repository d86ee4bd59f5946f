"""Make a merged mixture-of-experts model with room for routing, its tokenizer and question suite, from one seed.

    python jobs/make_planted_world.py --out FOLDER --seed 0
    python jobs/make_planted_world.py --out FOLDER --seed 0 --top-k 1      # one expert a token, its weight scaled to 1
    python jobs/make_planted_world.py --out OTHER --seed 0 --top-k 1 --weights-of FOLDER      # the same, without training

Needs no network and one CPU core. The same seed gives the same bits on the same kind of machine.
"""

import argparse
from pathlib import Path

from planted_world.assemble import build
from planted_world.recipe import Recipe


def main() -> None:
    """Parse the command line and make the world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=Recipe.seed, help="of people, facts, texts and weights (default: %(default)s)"
    )
    parser.add_argument(
        "--top-k", type=int, choices=(1, 2, 4), default=Recipe.top_k, help="experts of a token (default: %(default)s)"
    )
    parser.add_argument(
        "--gate-norm", type=float, default=Recipe.gate_norm, help="length of each gate's row (default: %(default)s)"
    )
    parser.add_argument(
        "--weights-of",
        type=Path,
        help="folder of the same seed with another --top-k or --gate-norm, whose weights serve",
    )
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed, top_k=arguments.top_k, gate_norm=arguments.gate_norm)
    print(build(arguments.out, recipe, arguments.weights_of))


if __name__ == "__main__":
    main()
