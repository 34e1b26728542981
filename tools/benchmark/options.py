"""The command line of `tools/bench.py`: what cannot work is refused before anything is measured."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmark import rivals
from benchmark.plan import SHAPES

PARTS = tuple(
    "copies latency beside tasks sizes bounds entries workers shards servers process".split()
)


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add(
        "--contestants",
        nargs="+",
        choices=rivals.ALL,
        metavar="NAME",
        help=f"of copies, latency, beside and tasks: {', '.join(rivals.ALL)} "
        f"(all but {', '.join(rivals.ASKED_FOR)}; with --cpp-lightmem only: "
        f"{', '.join(rivals.BESIDE_CPP)})",
    )
    add("--quick", action="store_true", help="small sizes, few rounds")
    add("--rounds", type=_at_least(1), help="samples of each kind (9; quick: 2)")
    add("--gib", type=_more_than_zero, help="GiB a pass (0.25; quick: 0.03)")
    add("--workers", type=_at_least(1), default=2, help="processes or threads (%(default)s)")
    add("--warm", type=_at_least(0), help="passes of writing before (8; quick: 2)")
    shapes = ", ".join(f"{n}: {shape.name}" for n, shape in enumerate(SHAPES))
    add("--shapes", type=int, nargs="+", choices=range(len(SHAPES)), metavar="N", help=shapes)
    add("--max-entries", type=_at_least(1000), help="largest index (10,000,000; quick: 10,000)")
    add(
        "--max-seconds", type=_more_than_zero, default=900.0, help="of entries, about (%(default)s)"
    )
    add("--entry-bytes", type=_at_least(1), default=64, help="block size of entries (%(default)s)")
    add("--seed", type=int, default=0, help="of the page order (%(default)s)")
    add("--cpp-lightmem", metavar="PATH", help="folder that holds the C++ package light_mem")
    add("--directory", type=Path, help="where the stores go (default: temporary)")
    add("--json", type=Path, help="write all figures there")
    add("--csv", type=Path, help="write all figures there, one a line")
    add("--plots", type=Path, metavar="DIR", help="draw PNG files there")
    args = parser.parse_args()
    if args.contestants is None:
        cpp = bool(args.cpp_lightmem)
        left = {*rivals.ASKED_FOR, *(() if cpp else rivals.BESIDE_CPP)}
        args.contestants = [kind for kind in rivals.ALL if kind not in left]
    args.gib = args.gib or (0.03 if args.quick else 0.25)
    _check_places(parser, args)
    return args


def _check_places(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """A run of half an hour must not end in a folder that is not there."""
    for path in (args.json, args.csv):
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            parser.error(f"cannot write {path}")
    place = args.directory or Path(tempfile.gettempdir())
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        parser.error(f"cannot make stores in {place}")
    # The largest plan has four blocks of 62.9 MB at least; stores have room for up to three passes.
    longest = max(4 * shape.block_bytes for shape in SHAPES)
    wanted = 3 * len(args.contestants) * max(args.gib * 2**30, 0 if args.quick else longest)
    free = shutil.disk_usage(place).free
    if "copies" in args.only and free < wanted:
        parser.error(
            f"{place} has {free / 1e9:.1f} GB free and the stores may take {wanted / 1e9:.1f}: "
            "use a smaller --gib, fewer --contestants or another --directory"
        )


def _at_least(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return number

    parsed.__name__ = "int"  # what argparse calls it when `int` fails
    return parsed


def _more_than_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return number
