"""`python -m vlm4vla_core.sims.libero`, in LIBERO's environment, fetches LIBERO's assets."""

import sys

from vlm4vla_core.sims.libero.assets import fetch

if __name__ == "__main__":
    sys.exit(fetch())
