"""`casfs-sandboxfs`: `casfs sandboxfs` as a program of its own, as Bazel takes the path of one and no arguments."""

from __future__ import annotations

import sys

from tools import main as casfs


def main() -> int:
    """Run it; returns the exit code."""
    return casfs.main(["sandboxfs", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
