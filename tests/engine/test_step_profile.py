"""The end of a process that has profiled steps."""

import subprocess
import sys

ABORTED_LATER = """
import atexit, ctypes, threading, time
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
atexit.register(print, "exit functions ran")
"""


def ended(command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", ABORTED_LATER + command], capture_output=True, text=True)


def test_a_fault_of_a_native_library_at_exit_does_not_fail_a_process_that_has_finished():
    assert ended("").returncode < 0, "the stand-in for such a library does not abort"
    done = ended("from hylo_megatron.engine.step_profile import end_process; print('done'); end_process()")
    assert (done.returncode, done.stdout) == (0, "done\nexit functions ran\n"), done.stderr


def test_threads_end_before_the_process():
    """A thread deletes older checkpoints."""
    thread = "threading.Thread(target=lambda: (time.sleep(0.3), print('deleted'))).start()"
    done = ended(f"from hylo_megatron.engine.step_profile import end_process; {thread}; end_process()")
    assert done.stdout == "deleted\nexit functions ran\n", done.stderr
