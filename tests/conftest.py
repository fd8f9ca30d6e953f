"""Environment of every test, set before anything imports torch."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores; spinning threads starve each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
