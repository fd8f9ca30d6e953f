#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct."""

from hylo_megatron.corpus.smollm2 import main

if __name__ == "__main__":
    main()
