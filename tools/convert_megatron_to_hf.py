#!/usr/bin/env python3
"""See ``--help``; the code is in hylo_megatron/convert/megatron_to_hf.py."""

from hylo_megatron.convert.megatron_to_hf import main

if __name__ == "__main__":
    main()
