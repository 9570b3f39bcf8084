"""Write nemo_bench/data/unicode17.json: the characters whose kind (letter, digit, ...) changed with Unicode 17.

pip install --target u16 unicodedata2==16.0.0
pip install --target u17 unicodedata2==17.0.0
python benchmarks/unicode17.py u16 u17 > nemo_bench/data/unicode17.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

CATEGORIES = "import json, sys, unicodedata2 as u; print(json.dumps([u.category(chr(c)) for c in range(0x110000)]))"


def categories(folder: str) -> list[str]:
    """Return the general category of every character, as the unicodedata2 in this folder knows it."""
    environment = {**os.environ, "PYTHONPATH": folder}
    shown = subprocess.run([sys.executable, "-c", CATEGORIES], env=environment, capture_output=True, check=True)
    return [str(category) for category in json.loads(shown.stdout)]


if __name__ == "__main__":
    older, newer = map(categories, sys.argv[1:])
    ranges: list[list[int]] = []
    for code in range(0x110000):
        if older[code] != newer[code]:
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    print(json.dumps([f"{chr(first)}-{chr(last)}" for first, last in ranges], indent=1))
