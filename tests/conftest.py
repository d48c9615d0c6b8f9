"""Makes the helpers of test jobs importable (`tests/jobs` is where the jobs themselves run)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "jobs"))
