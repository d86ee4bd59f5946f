"""Feed damaged files to every reader: python -m tests.fuzzing --inputs 100000. `make fuzz` runs it.

Each reader works in a process of its own, so that a crash of a C library is seen as one. A failure leaves the input in a
file that is named, and the same --seed finds it again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.fuzzing.runner import LAST, PATIENCE, fuzz, limit_memory
from tests.fuzzing.targets import TARGETS


def main() -> int:
    """Run all targets, or as a child process one of them; the exit code is the number of readers at fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a part of the reader's name")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child, options.inputs, options.seed)
    chosen = [t for t in TARGETS if not options.only or options.only in t.name]
    shares = sum(t.share for t in chosen)
    wanted = {t.name: -(-options.inputs * t.share // shares) for t in chosen}
    total = failures = 0
    print(f"{'reader':<24} {'inputs':>8} {'accepted':>9} {'refused':>8} {'slowest s':>10} {'wall s':>7}")
    for target in chosen:
        folder = Path(tempfile.mkdtemp(prefix="roma-fuzz-"))
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.fuzzing", "--child", target.name, str(folder)]
        command += ["--inputs", str(wanted[target.name]), "--seed", str(options.seed)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600 + 0.2 * wanted[target.name])
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, out, err = -1, "", f"hung: no end long after {PATIENCE} s an input"
        if code:
            failures += 1
            print(
                f"{target.name:<24} FAILED ({f'signal {-code}' if code < 0 else f'exit {code}'})\n{out}{'' if out else err[-3000:]}"
            )
            print(f"    its last input: {folder / LAST}", flush=True)
            continue
        inputs, accepted, refused, slowest = out.split()[-4:]
        total += int(inputs)
        wall = time.monotonic() - began
        print(f"{target.name:<24} {inputs:>8} {accepted:>9} {refused:>8} {slowest:>10} {wall:>7.1f}", flush=True)
        shutil.rmtree(folder)
    print(f"{total} inputs, {len(chosen)} readers, {failures} at fault")
    return failures


def child(name: str, folder: str, inputs: int, seed: int) -> int:
    """One target in this process; prints its count."""
    target = next(t for t in TARGETS if t.name == name)
    limit_memory()
    try:
        count = fuzz(target, inputs, seed, Path(folder))
    except BaseException as error:  # noqa: BLE001 - whatever a reader raises is the finding
        for one in error.exceptions if isinstance(error, BaseExceptionGroup) else [error]:
            print(in_short(one))
        return 1
    print(count.total, count.accepted, count.refused, f"{count.slowest:.3f}")
    return 0


def in_short(error: BaseException) -> str:
    """Where the project's code was, what was raised, and the input that did it."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "roma_ray" in f.filename or "fuzzing" in f.filename
    ]
    place = f"{frames[-1].filename.rpartition('roma_ray/')[2]}:{frames[-1].lineno}" if frames else "?"
    notes = " ".join(getattr(error, "__notes__", []))
    return f"    {place} {type(error).__name__}: {str(error)[:300]}\n      {' '.join(notes.split())[:700]}"


if __name__ == "__main__":
    sys.exit(main())
