"""Entry point: `ray job submit --working-dir . -- python jobs/serve.py RUN [--models …] [--section.field=value …]`.

The same as `spin-ray serve`, for clusters that get the working directory only; it runs until the job is stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spin_ray.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
