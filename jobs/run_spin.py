"""Entry point: `ray job submit --working-dir . -- python jobs/run_spin.py RECIPE --out RUN [--section.field=value …]`.

The same as `spin-ray run`, for clusters where only the working directory is shipped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spin_ray.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
