#!/usr/bin/env python3
"""See ``--help``; the code is in hylo_megatron/convert/amd_release/convert.py."""

from hylo_megatron.convert.amd_release.convert import main

if __name__ == "__main__":
    main()
