"""End a training on all its ranks when one of them cannot go on: a lost rank, a dead writer, a full disk.

Otherwise the ranks that are left wait in a collective, for ten minutes or for ever, and two ranks that fail print each
other's tracebacks. So every rank keeps a connection to rank 0, which the kernel closes when the rank's process dies.
Rank 0 then prints the reason once, and all ranks end. They do not use Python's own exit, which waits for helper
processes that may be dead.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

CODE = 2  # exit code of every rank that ends here
NEWS_SECONDS = 5  # how long a rank whose collective fails waits for the rank with the cause
SIGNAL_SECONDS = 1  # torchrun ends all ranks when one is lost; this is the time to print which one
AGAIN = "the same command goes on from the last checkpoint"
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # notices a lost node in 30 s


class _Run:
    """State of this process. ``link``: its connection to rank 0; ``others``: rank 0's connections."""

    rank, size, pid = 0, 1, 0
    link: socket.socket | None = None
    others: dict[socket.socket, dict] = {}
    left, connected = False, False
    lock = threading.Lock()


def _end() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a log on a full disk
            stream.flush()
    os._exit(CODE)


def _end_in(seconds: float) -> None:
    """End this process after ``seconds``, even if its threads wait, for example on a pipe that nobody reads."""
    timer = threading.Timer(seconds, os._exit, (CODE,))
    timer.daemon = True
    timer.start()


def _say(text: str) -> None:
    with contextlib.suppress(Exception):
        print(f"error: {text}", file=sys.stderr, flush=True)


def _send(connection: socket.socket, **message) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def fail(text: str) -> NoReturn:
    """Print ``text`` once for the whole run, and end all ranks. Any thread may call this."""
    if not _Run.lock.acquire(blocking=False):  # another thread is ending this process
        threading.Event().wait()
    _end_in(4 * NEWS_SECONDS)
    if _Run.link is not None:
        _send(_Run.link, failed=text)
        time.sleep(3 * NEWS_SECONDS)  # rank 0 prints it and closes the connection; ``_listen`` then ends this process
    _say(text)
    for other in list(_Run.others):
        _send(other, stop=True)
    _end()


# ---- connections ----


def _configure(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _messages(data: bytes) -> tuple[list[dict], bytes]:
    *lines, rest = data.split(b"\n")
    return [json.loads(each) for each in lines], rest


def _gone(who: dict) -> str:
    return (
        f"rank {who['rank']} (process {who['pid']} on {who['host']}) is gone: it was killed, or its machine ran out"
        f" of memory; {AGAIN}"
    )


def _received(connection: socket.socket, token: str) -> bool:
    """Read from a connection of rank 0, and return whether it stays open. Ends the run when its rank is gone."""
    state = _Run.others.get(connection, {"rest": b""})
    try:
        data = connection.recv(65536)
    except OSError:
        data = b""
    if not data:
        if "rank" in state and not state.get("done") and not _Run.left:
            fail(_gone(state))
        return False
    try:
        messages, state["rest"] = _messages(state["rest"] + data)
    except ValueError:
        return False
    for message in messages:
        if "rank" not in state and message.get("token") != token:  # not a rank of this run
            return False
        if "failed" in message:
            fail(f"rank {state['rank']}: {message['failed']}")
        state.update(message)
    if "rank" in state:
        _Run.others[connection] = state
    return len(state["rest"]) < 2**20


def hear_the_others(seconds: float) -> None:
    """Wait ``seconds``, and on rank 0 until ``_serve`` has read what the others have sent, and which of them are gone.

    The connection of a rank that is gone leaves ``_Run.others`` with the report only, however long that takes.
    """
    time.sleep(seconds)
    end = time.monotonic() + 3 * NEWS_SECONDS
    while any(map(_unread, list(_Run.others))) and time.monotonic() < end:
        time.sleep(0.02)


def _unread(connection: socket.socket) -> bool:
    """Return whether a message, or the end of the connection, can be read."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _serve(listener: socket.socket, token: str) -> None:
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                _configure(connection)
                selector.register(connection, selectors.EVENT_READ)
            elif not _received(key.fileobj, token):
                selector.unregister(key.fileobj)
                _Run.others.pop(key.fileobj, None)
                key.fileobj.close()


def _listen(link: socket.socket, zero: dict) -> None:
    rest, ended = b"", False
    while True:
        try:
            data = link.recv(65536)
        except OSError:
            data = b""
        if not data:
            break
        messages, rest = _messages(rest + data)
        if any("stop" in message for message in messages):
            _end()
        ended = ended or any("end" in message for message in messages)
    if ended or _Run.left:
        return
    if _Run.rank == 1:  # one rank prints it for all
        _say(_gone(zero))
    _end()


def _reach(addresses: list[str], port: int) -> socket.socket | None:
    for address in addresses:
        with contextlib.suppress(OSError):
            link = socket.create_connection((address, port), timeout=20)
            link.settimeout(None)
            return link
    return None


def connect() -> None:
    """Connect all ranks. Every rank calls this at the same place, once ``torch.distributed`` is initialised."""
    import torch

    if _Run.connected or torch.distributed.get_world_size() == 1:
        return
    _Run.connected = True
    _Run.rank, _Run.size, _Run.pid = torch.distributed.get_rank(), torch.distributed.get_world_size(), os.getpid()
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # megatron's own handler saves first
        signal.signal(signal.SIGTERM, _terminated)
    me = {"rank": _Run.rank, "pid": os.getpid(), "host": socket.gethostname()}
    known = [None]
    if _Run.rank == 0:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        local = address if address in ("127.0.0.1", "localhost") else ""
        listener = socket.create_server((local, 0), backlog=_Run.size)
        token = secrets.token_hex(16)
        known = [{"token": token, "port": listener.getsockname()[1], "addresses": [address, me["host"]], "zero": me}]
        threading.Thread(target=_serve, args=(listener, token), daemon=True).start()
    torch.distributed.broadcast_object_list(known, 0)
    if _Run.rank == 0:
        return
    link = _reach(known[0]["addresses"], known[0]["port"])
    if link is None:
        where = f"{' or '.join(known[0]['addresses'])}, port {known[0]['port']}"
        wait = "should a rank be lost, the others wait for --distributed-timeout-minutes"
        print(f"warning: rank {_Run.rank} cannot reach rank 0 at {where}: {wait}", file=sys.stderr, flush=True)
        return
    _configure(link)
    _send(link, token=known[0]["token"], **me)
    _Run.link = link
    threading.Thread(target=_listen, args=(link, known[0]["zero"]), daemon=True).start()


def _terminated(number: int, _) -> None:
    """Handle SIGTERM: tell the others that this rank is not lost, because its sender ends all ranks."""
    if os.getpid() == _Run.pid:
        forget_workers()
        hear_the_others(SIGNAL_SECONDS)
        leave()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def forget_workers() -> None:
    """Let no data worker that ends from now on raise torch's error here, in the middle of a wait for the cause."""
    with contextlib.suppress(ValueError):  # another thread than the main one, where none is raised
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def alone() -> bool:
    """Return whether this training has no other rank."""
    return _Run.size == 1


def follow() -> NoReturn:
    """End this process after another rank has printed the reason, or would print it within ``NEWS_SECONDS``."""
    time.sleep(NEWS_SECONDS if _Run.link is not None else 0)
    _end()


def leave() -> None:
    """Tell the others that this rank is not lost when its connection closes."""
    _Run.left = True
    if _Run.link is not None:
        _send(_Run.link, done=True)
    for other in list(_Run.others):
        _send(other, end=True)
