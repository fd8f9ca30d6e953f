"""The OpenAI server on a hybrid: answers, refusals, cancelled requests, and no trace of them afterwards."""

import contextlib
import json
import os
import random
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from helpers import processes
from helpers.serving import write_folder
from helpers.waits import PATIENCE

from hylo_megatron.serve.demo import Server

LIMIT = 512
pytestmark = pytest.mark.xdist_group("server")  # one process of tests starts it


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("http")
    folder = write_folder(work / "model", "native", "gdn")
    options = ["--max-model-len", str(LIMIT), "--max-num-seqs", "8"]
    with Server(folder, work / "server.log", options, PATIENCE) as running:
        yield running


def post(server, path: str, body: dict | bytes, timeout: float = PATIENCE):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=timeout)


def complete(server, prompt: list[int], tokens: int = 8) -> str:
    body = dict(model=server.name, prompt=prompt, max_tokens=tokens, temperature=0, ignore_eos=True)
    with post(server, "/v1/completions", body) as answer:
        answer = json.loads(answer.read())
    assert answer["usage"]["completion_tokens"] == tokens
    return answer["choices"][0]["text"]


def refused(server, path: str, body) -> int:
    with pytest.raises(urllib.error.HTTPError) as error:
        post(server, path, body)
    return error.value.code


def resident(server) -> int:
    """KiB of the server and of its processes."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    pids, total = [str(server.process.pid), *children], 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # a helper that has ended since
            status = Path(f"/proc/{pid}/status").read_text()
            total += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return total


def test_chat_streams(server):
    pieces = list(server.chat("Say something.", max_tokens=12))
    assert len(pieces) > 1 and "".join(pieces)


def test_bad_requests_are_refused(server):
    assert refused(server, "/v1/completions", b"{not json") == 400
    assert refused(server, "/v1/completions", dict(model=server.name, prompt=[5] * (LIMIT + 1))) == 400
    assert refused(server, "/v1/completions", dict(model=server.name, prompt=[5], max_tokens=-1)) == 400
    assert refused(server, "/v1/completions", dict(model=server.name, prompt=[5, 10**6])) == 400  # no such token
    assert refused(server, "/v1/completions", dict(model="another", prompt=[5])) == 404
    assert refused(server, "/v1/nothing", {}) == 404


def cancel(server, prompt: list[int]) -> None:
    body = dict(model=server.name, prompt=prompt, max_tokens=200, temperature=0, ignore_eos=True, stream=True)
    answer = post(server, "/v1/completions", body)
    answer.readline()
    answer.close()  # in the middle of the stream


def traffic(server, requests: int, seed: int) -> list[str]:
    """Answered, cancelled and refused requests, eight at once; what went wrong."""
    rng, wrong, lock = random.Random(seed), [], threading.Lock()
    kinds = [rng.choices(["answer", "cancel", "too long", "malformed"], [6, 2, 1, 1])[0] for _ in range(requests)]
    lengths = [rng.randint(1, LIMIT - 64) for _ in kinds]

    def one(kind: str, length: int) -> None:
        prompt = [3 + (7 * i + length) % 250 for i in range(length)]
        try:
            if kind == "answer":
                complete(server, prompt, 1 + length % 16)
            elif kind == "cancel":
                cancel(server, prompt)
            elif kind == "too long":
                assert refused(server, "/v1/completions", dict(model=server.name, prompt=prompt * 600)) == 400
            else:
                assert refused(server, "/v1/completions", b"[" * length) in (400, 422)
        except BaseException as error:  # noqa: BLE001
            with lock:
                wrong.append(f"{kind} {length}: {error!r}")

    work = list(zip(kinds, lengths, strict=True))
    for start in range(0, len(work), 8):
        threads = [threading.Thread(target=one, args=item) for item in work[start : start + 8]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a request hangs"
    return wrong


def test_traffic_leaves_no_trace(server):
    """HYLO_REQUESTS=57000 is about an hour."""
    requests = int(os.environ.get("HYLO_REQUESTS", "1000"))
    prompt = [3 + i % 250 for i in range(200)]
    before = complete(server, prompt, 32)
    assert not traffic(server, requests // 4, 1)
    memory = resident(server)
    assert not traffic(server, requests - requests // 4, 2)
    assert complete(server, prompt, 32) == before
    assert resident(server) <= 1.05 * memory + 50_000, "memory grows"


def test_server_goes_with_its_context(tmp_path, monkeypatch):
    """No process is left behind when the server's owner leaves, and a server that fails says why."""
    (tmp_path / "config.json").write_text("{}")
    mark = processes.mark()
    monkeypatch.setenv(processes.VARIABLE, mark)  # every process of the server inherits it
    with pytest.raises(SystemExit, match="server.log"), Server(tmp_path, tmp_path / "server.log", []):
        pass
    processes.wait_until_gone(mark)  # the kernel may take a moment for those that were killed
