"""Sizes, ages and hashes as people write them, and the arguments that commands share."""

from __future__ import annotations

import argparse
import math
import re
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path

from light_mem.errors import InvalidArgumentError
from light_mem.index.keys import HashValue, as_key

Commands = argparse._SubParsersAction  # of ArgumentParser; it has no public name

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

HASH_HELP = """\
A HASH is what the server passed as a str; 32 lower-case hex digits, as `dump` shows them, name a
key itself. int:123 is the int 123, hex:00ff the bytes 00 ff."""


def add_command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    text: str,
    *,
    store: bool = True,
    json: bool = True,
) -> argparse.ArgumentParser:
    """A sub-command with the two arguments that most have: STORE and --json."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if store:
        parser.add_argument("store", metavar="STORE", type=path, help="directory of the store")
    if json:
        parser.add_argument("--json", action="store_true", help="print the result as JSON only")
    parser.set_defaults(command=run, name=name)
    return parser


def add_interval(parser: argparse.ArgumentParser, default: float | None, what: str) -> None:
    """--interval, for commands that look twice or more."""
    parser.add_argument("--interval", metavar="SECONDS", type=interval, default=default, help=what)


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry-run, for every command that changes something."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be; change nothing")


def add_hashes(parser: argparse.ArgumentParser, what: str) -> None:
    """HASH ... and --hashes FILE."""
    parser.add_argument("hashes", metavar="HASH", nargs="*", type=hash_value, help=what)
    parser.add_argument(
        "--hashes", metavar="FILE", dest="hash_file", type=file, help="more hashes, one a line"
    )


def take_late_hashes(arguments: argparse.Namespace, left: list[str]) -> list[str]:
    """Put HASHes that stand behind an option where they belong: argparse of Python before 3.13 has
    left them over. Returns what of `left` is none. Raises argparse.ArgumentTypeError."""
    at = left.index("--") if "--" in left else len(left)
    words = left[:at] + left[at + 1 :]
    if any(re.match("-.", word) for word in left[:at]):  # an option that is unknown
        return left
    if hasattr(arguments, "hashes"):
        arguments.hashes = [*arguments.hashes, *map(hash_value, words)]
        return []
    if len(words) == 1 and getattr(arguments, "hash", "none is taken") is None:
        arguments.hash = hash_value(words[0])
        return []
    return left


def chosen_hashes(arguments: argparse.Namespace) -> list[HashValue] | None:
    """The hashes of HASH ... and --hashes; None: none were given, which means all blocks.

    Raises OSError, InvalidArgumentError.
    """
    hashes: list[HashValue] = list(arguments.hashes)
    if arguments.hash_file is None:
        return hashes or None
    try:
        # As tools write it, in any locale; some begin with a byte order mark.
        text = arguments.hash_file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(
            f"{arguments.hash_file} is no UTF-8 text: {error}", path=str(arguments.hash_file)
        ) from None
    for line in text.split("\n"):  # a hash may hold what else ends a line of text, and blanks
        if word := line.removesuffix("\r"):
            try:
                hashes.append(hash_value(word))
            except argparse.ArgumentTypeError as error:
                raise InvalidArgumentError(
                    f"{arguments.hash_file}: {error}",
                    path=str(arguments.hash_file),
                    reason=str(error),
                ) from None
    return hashes


def path(text: str) -> str:
    """A path. "" comes from a variable that is not set, and would mean the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; the current directory is .")
    return text


def file(text: str) -> Path:
    """The path of a file. "-" is none: results for people may go to standard output as well."""
    if text == "-":
        raise argparse.ArgumentTypeError(
            "'-' does not stand for standard input or output; ./- is a file of that name"
        )
    return Path(path(text))


def size(text: str) -> int:
    """Bytes: 1000, 64M, 1.5GiB (K, M, G, T and KiB ... are powers of 1024; KB ... of 1000)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"no size: {text!r} (like 500M, 10G, 1.5TiB)")
    number, unit, suffix = found.groups()
    base = 1000 if suffix == "b" else 1024
    factor = base ** " kmgt".index(unit) if unit else 1
    wanted = float(number) * factor
    if wanted >= 2**63:  # so long a number is infinity here, which no int is
        raise argparse.ArgumentTypeError(
            f"a size is less than 2**63 bytes, not {reprlib.repr(text)}"
        )
    count = round(wanted)
    if count < 1:
        raise argparse.ArgumentTypeError(f"a size is at least one byte, not {text!r}")
    return count


def age(text: str) -> float:
    """Seconds: 90s, 30m, 2h, 7d, 2w."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"no time: {text!r} (like 90s, 30m, 2h, 7d, 2w)")
    seconds = float(found[1]) * _SECONDS[found[2]]
    if math.isinf(seconds * 1e9):  # times of use are in ns
        raise argparse.ArgumentTypeError(f"no time so long: {reprlib.repr(text)}")
    return seconds


def hash_value(text: str) -> HashValue:
    """A hash as the server passed it; see HASH_HELP."""
    kind, colon, rest = text.partition(":")
    try:
        if colon and kind == "int":
            value: HashValue = int(rest, 0)
        elif colon and kind == "hex":
            value = bytes.fromhex(rest)
        else:
            value = text
        as_key(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no hash: {text!r} ({error})") from None
    return value


def count(text: str) -> int:
    """A whole number above zero, as great as a list can be long."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= sys.maxsize:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {reprlib.repr(text)}")
    return number


def interval(text: str) -> float:
    """Seconds above zero, a day at most."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"seconds above 0, at most 86400 (a day), not {text!r}")
    return seconds


def port(text: str) -> int:
    """A TCP port; 0: a free one."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is 0 to 65535, not {text!r}")
    return int(text)
