"""``python -m icce_ray``: the command line, as ``icce-ray``."""

import sys

from icce_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
