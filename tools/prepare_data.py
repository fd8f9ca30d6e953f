#!/usr/bin/env python3
"""Tokenize text into Megatron .bin and .idx files."""

from hylo_megatron.data.prepare import main

if __name__ == "__main__":
    main()
