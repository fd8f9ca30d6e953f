"""Run the toy recipe in a folder, as a program of its own that a test can kill: toy_recipe.py FOLDER"""

import sys
from pathlib import Path

from helpers.recipes import toy_recipe

from hylo_megatron.run.launch import Processes
from hylo_megatron.run.recipe_run import Run

if __name__ == "__main__":
    Run(toy_recipe(), Path(sys.argv[1]), Processes.found()).execute()
