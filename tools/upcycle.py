#!/usr/bin/env python3
"""See ``--help``; the code is in hylo_megatron/init/upcycle.py."""

from hylo_megatron.init.upcycle import main

if __name__ == "__main__":
    main()
