"""The benchmarks are scripts beside each other, not a package: their folder is put where Python looks for modules."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))
