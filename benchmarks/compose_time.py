"""Time of `train.py --cfg job`, against a bare Hydra app with as many configuration files.

    python benchmarks/compose_time.py [runs]

Both are run in turn, A B A B ..., as whole processes; the ratio of the medians is what counts (target: at most 1.5).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

BARE_APP = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg):
    pass

main()
"""


def bare_app(folder: Path) -> list[str]:
    """A Hydra app without schema, resolvers or checks, with the groups and options of ours."""
    (folder / "app.py").write_text(BARE_APP)
    defaults = []
    for group in sorted(path for path in (PROJECT / "conf").iterdir() if path.is_dir()):
        (folder / "conf" / group.name).mkdir(parents=True)
        options = sorted(path.name for path in group.rglob("*.yaml"))
        for option in options:
            (folder / "conf" / group.name / option).write_text("key: value\nother: 1\n")
        if group.name not in ("experiment", "hydra"):
            defaults.append(f"  - {group.name}: {options[0].removesuffix('.yaml')}\n")
    (folder / "conf" / "train.yaml").write_text("defaults:\n" + "".join(defaults) + "  - _self_\n")
    return [sys.executable, str(folder / "app.py"), "--cfg", "job"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    ours = [sys.executable, str(PROJECT / "train.py"), "--cfg", "job", "precision=fp8", "scale=128gpu"]
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_app(Path(folder))
        seconds(ours), seconds(bare)  # byte-compiled files, disk cache
        pairs = [(seconds(ours), seconds(bare)) for _ in range(runs)]
    for name, times in zip(("train.py --cfg job", "bare Hydra app"), zip(*pairs)):
        low, middle, high = min(times), statistics.median(times), max(times)
        print(f"{name:20} median {middle:.3f} s   (min {low:.3f}, max {high:.3f}, {runs} runs)")
    ratios = [a / b for a, b in pairs]
    print(f"{'ratio':20} median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
