"""Serve an exported folder with vLLM on 127.0.0.1, stream one chat completion from it, and stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hylo_megatron.flags import Parser


class Server:
    """vLLM's OpenAI server on a free port of 127.0.0.1, ready when the ``with`` block begins and gone after it."""

    def __init__(self, model: Path, log: Path, options: list[str], wait: float = 600):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name, self.url, self.log, self.wait = str(model), f"http://127.0.0.1:{port}", log, wait
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host",
                        "127.0.0.1", "--port", str(port), *options]  # fmt: skip

    def __enter__(self) -> "Server":
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        end = time.monotonic() + self.wait
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                errors = [line for line in self.log.read_text().splitlines() if "Error" in line]
                sys.exit(f"error: the server did not start (its words: {self.log}): {errors[-1] if errors else '-'}")
            time.sleep(0.5)
        return self

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def __exit__(self, *_) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):  # to its whole group: the engine is a process of its own
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
        """The answer, piece by piece."""
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


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="What is a transformer?")
    parser.add_argument("--max-tokens", type=int, default=48)
    known = parser.parse_args()
    if not (known.model / "config.json").exists():
        sys.exit(f"error: {known.model} holds no exported model: run `make demo` first, or name another folder")
    log = known.model.with_name(known.model.name + "-server.log")
    print(f"starting vLLM on {known.model} (its words: {log})", flush=True)
    started = time.monotonic()
    with Server(known.model, log, ["--max-model-len", "2048", "--max-num-seqs", "4"]) as server:
        print(f"ready after {time.monotonic() - started:.0f} s at {server.url}\n\n> {known.prompt}", flush=True)
        for piece in server.chat(known.prompt, known.max_tokens):
            print(piece, end="", flush=True)
        print("\n", flush=True)
    print("stopped")
