#!/usr/bin/env python3
"""Make packed training samples that ask for what is hidden in a text."""

from hylo_megatron.retrieval.make import main

if __name__ == "__main__":
    main()
