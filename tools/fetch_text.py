#!/usr/bin/env python3
"""Write the demo text files from pinned packages."""

from hylo_megatron.corpus.text import main

if __name__ == "__main__":
    main()
