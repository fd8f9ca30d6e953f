"""The end of a process that has profiled steps."""

import subprocess
import sys

import pytest

ABORTS_LATER = """
import atexit, ctypes, torch
from hylo_megatron.engine.step_profile import end_without_cupti
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
atexit.register(print, "exit functions ran")
torch.cuda.device_count = lambda: {gpus}
print("done")
end_without_cupti()
"""


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_fault_of_a_native_library_at_exit_does_not_fail_a_profiled_training_on_a_gpu(gpus):
    command = [sys.executable, "-c", ABORTS_LATER.format(gpus=gpus)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (gpus > 0), (
        done.stderr
    )  # without a GPU the process goes on, and aborts at its end
    assert done.stdout == "done\nexit functions ran\n"
