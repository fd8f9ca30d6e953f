#!/usr/bin/env python3
"""See ``--help``; the code is in hylo_megatron/convert/hf_to_megatron.py."""

from hylo_megatron.convert.hf_to_megatron import main

if __name__ == "__main__":
    main()
