"""Serve an exported folder with vLLM on 127.0.0.1, stream one chat completion from it, and stop."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hylo_megatron import packages
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line


def held_port() -> socket.socket:
    """Return a socket on a port of 127.0.0.1 that no other program gets while the socket is open.

    The socket does not listen. A program that knows the port can listen there if it sets SO_REUSEADDR, as servers do.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


class Server:
    """vLLM's OpenAI server on a free port of 127.0.0.1, ready when the ``with`` block begins and gone after it."""

    program = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")

    def __init__(self, model: Path, log: Path, options: list[str], wait: float = 600):
        self.name, self.log, self.options, self.wait = str(model), log, options, wait

    def __enter__(self) -> "Server":
        with held_port() as holder:
            self._start(holder.getsockname()[1])
            try:
                if self._becomes_ready():
                    return self
            except BaseException:  # such as Ctrl-C: no "with" block has begun, so nothing else would stop vLLM
                self.__exit__()
                raise
        self.__exit__()
        errors = [line for line in self.log.read_text(errors="replace").splitlines() if "Error" in line]
        sys.exit(f"error: the server did not start (its log: {self.log}): {errors[-1] if errors else '-'}")

    def _start(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [*self.program, "--model", self.name, "--host", "127.0.0.1", "--port", str(port), *self.options]
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env,
                                            start_new_session=True)  # fmt: skip

    def _becomes_ready(self) -> bool:
        end = time.monotonic() + self.wait
        while self.process.poll() is None and time.monotonic() < end:
            if self._ready():
                return True
            time.sleep(0.5)
        return False

    def _ready(self) -> bool:
        """Return whether this server answers, and not another program on the same port."""
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
                return json.load(answer)["data"][0]["id"] == self.name
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError):
            return False

    def __exit__(self, *_) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):  # to its whole group: vLLM's engine is a process of its own
            try:
                os.killpg(self.process.pid, sent)
            except ProcessLookupError:
                return
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                continue
            time.sleep(1)

    def chat(self, text: str, max_tokens: int) -> Iterator[str]:
        """Yield the answer, piece by piece."""
        body = dict(model=self.name, messages=[dict(role="user", content=text)], max_tokens=max_tokens, stream=True,
                    temperature=0)  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            for line in answer:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)["choices"][0]["delta"].get("content") or ""


@command_line
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="What is a transformer?")
    parser.add_argument("--max-tokens", type=int, default=48)
    known = parser.parse_args()
    if not (known.model / "config.json").exists():
        raise HyLoError(f"{known.model} holds no exported model: run `make demo` first, or name another folder")
    packages.require("vllm", "hylo serve-demo")
    log = known.model.with_name(known.model.name + "-server.log")
    print(f"starting vLLM on {known.model} (its log: {log})", flush=True)
    started = time.monotonic()
    with Server(known.model, log, ["--max-model-len", "2048", "--max-num-seqs", "4"]) as server:
        print(f"ready after {time.monotonic() - started:.0f} s at {server.url}\n\n> {known.prompt}", flush=True)
        for piece in server.chat(known.prompt, known.max_tokens):
            print(piece, end="", flush=True)
        print("\n", flush=True)
    print("stopped")
