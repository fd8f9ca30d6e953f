#!/usr/bin/env python3
"""What this machine has, and what each missing package would bring: ``python tools/doctor.py``.

Runs with nothing installed, also from a clone that was never set up."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hylo_megatron.capabilities import main  # noqa: E402

if __name__ == "__main__":
    main()
