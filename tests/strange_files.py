"""A directory of somebody else's files, named like modules that every child imports."""

from __future__ import annotations

from pathlib import Path

# A child needs them, and a parent that has imported light_mem has them all: it looks for none.
NAMES = ("json", "re", "enum", "types", "functools", "linecache", "queue", "numpy", "light_mem")


class StrangeFiles:
    """Those files, and the mark that each of them leaves when it runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "strange"
        self.mark = directory / "mark"
        code = f"with open({str(self.mark)!r}, 'a') as mark: mark.write(__name__ + ' ')\n"
        self.directory.mkdir()
        for name in NAMES:
            (self.directory / f"{name}.py").write_text(code)
        # The interpreter's own first import.
        (self.directory / "encodings").mkdir()
        (self.directory / "encodings" / "__init__.py").write_text(code)

    @property
    def that_ran(self) -> list[str]:
        """Names of those that did."""
        return self.mark.read_text().split() if self.mark.exists() else []
