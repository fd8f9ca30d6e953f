"""A process that has imported everything a training imports, and forks one for each training that a test asks for.

``python zygote.py``: reads lines of JSON ``{"argv", "environment", "out", "err"}``, answers each with the child's
process number and, when it has ended, with ``[number, exit code]``. Importing torch and megatron takes most of the
time of a training of a few steps.
"""

import json
import os
import sys
import threading

from hylo_megatron import train


def wait_for(child: int) -> None:
    _, status = os.waitpid(child, 0)
    print(json.dumps([child, os.waitstatus_to_exitcode(status)]), flush=True)


def become(order: dict) -> None:
    """In the child: what ``python -m hylo_megatron.train`` starts with."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.setsid()
    for path, descriptor in ((order["out"], 1), (order["err"], 2)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [train.__file__, *order["argv"]]


def main() -> None:
    from hylo_megatron.engine.register import install, patches

    install("megatron")
    for patch in patches("writing", "training"):
        patch.place()  # imports the module that holds the name

    for line in sys.stdin:
        order = json.loads(line)
        if (child := os.fork()) == 0:
            become(order)
            train.main()
            return
        print(child, flush=True)
        threading.Thread(target=wait_for, args=(child,), daemon=True).start()


if __name__ == "__main__":
    main()
