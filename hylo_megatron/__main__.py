"""``python -m hylo_megatron COMMAND`` is ``hylo COMMAND``."""

from hylo_megatron.cli import main

if __name__ == "__main__":
    main()
