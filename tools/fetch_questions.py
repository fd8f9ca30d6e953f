#!/usr/bin/env python3
"""Write question files for ``hylo evaluate --choice`` and ``--answers`` from a pinned package."""

from hylo_megatron.corpus.questions import main

if __name__ == "__main__":
    main()
