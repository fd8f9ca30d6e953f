"""The ``hylo`` command: every subcommand and every script in ``tools/`` leads to a ``main``."""

import ast
import runpy
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from hylo_megatron import cli


def hylo(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hylo_megatron", *argv], capture_output=True, text=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_a_main(name):
    path = ROOT / "hylo_megatron" / (cli.COMMANDS[name].module.replace(".", "/") + ".py")
    functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert "main" in functions


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py") if path.is_symlink()))
def test_a_tool_is_a_command_under_its_earlier_name(tool):
    command_of = runpy.run_path(str(ROOT / "tools" / "earlier_name.py"))["command_of"]
    assert (ROOT / "tools" / tool).readlink().name == "earlier_name.py"
    assert command_of(f"tools/{tool}") in cli.COMMANDS


def test_an_earlier_name_runs_its_command():
    for tool, flag in (("plan_memory", "--utilization"), ("prepare_data", "--pack-length")):
        command = [sys.executable, f"tools/{tool}.py", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and flag in done.stdout, done.stderr


def test_help_lists_the_commands():
    printed = hylo("--help").stdout
    assert all(f"  {name} " in printed for name in cli.COMMANDS)
    assert hylo().stdout == printed


def test_completion_is_what_bash_takes():
    script = hylo("--completion").stdout + "complete -p hylo"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "upcycle" in done.stdout


def test_an_unknown_command_is_refused_in_one_line():
    done = hylo("upcycled")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "hylo upcycled: no such command, expected one of fetch-smollm2" in done.stderr


def test_help_of_a_command_shows_its_defaults():
    printed = " ".join(hylo("prepare-data", "--help").stdout.split())
    assert printed.startswith("usage: hylo prepare-data") and "--text-key" in printed
    planned = " ".join(hylo("plan", "--help").stdout.split())
    assert "(default: 0.9)" in planned and "(default: an H200's)" in planned and "None" not in planned


def test_a_missing_package_is_one_line():
    """Without site-packages there is no torch."""
    command = [sys.executable, "-S", "-m", "hylo_megatron", "upcycle", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "error: hylo upcycle needs the package" in done.stderr and "hylo doctor" in done.stderr


SERVER = """
import http.server, json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if not os.path.exists(given["--marker"]):
    open(given["--marker"], "w").close()
    sys.exit("OSError: [Errno 98] Address already in use")
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": given["--model"]}]}).encode())
http.server.HTTPServer(("127.0.0.1", int(given["--port"])), Models).serve_forever()
"""


def test_the_demo_takes_another_port_when_its_port_was_taken(tmp_path, monkeypatch):
    from hylo_megatron.serve.demo import Server

    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setattr(Server, "program", (sys.executable, str(tmp_path / "server.py")))
    server = Server(tmp_path / "model", tmp_path / "log", ["--marker", str(tmp_path / "marker")], wait=60)
    with server:
        assert server.process.poll() is None and "already in use" not in server.log.read_text()
    assert server.process.poll() is not None
    monkeypatch.setattr(
        Server, "program", (sys.executable, "-c", "import sys; sys.exit('OSError: Address already in use')")
    )
    with (
        pytest.raises(SystemExit, match="did not start .*Address already in use"),
        Server(tmp_path, tmp_path / "log", []),
    ):
        raise AssertionError("a server that never had a port")


def test_the_demo_stops_the_server_when_it_is_interrupted_while_waiting(tmp_path, monkeypatch):
    from hylo_megatron.serve.demo import Server

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "program", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(Server, "_ready", interrupt)
    server = Server(tmp_path, tmp_path / "log", [])
    with pytest.raises(KeyboardInterrupt), server:
        raise AssertionError("never ready")
    assert server.process.poll() is not None
