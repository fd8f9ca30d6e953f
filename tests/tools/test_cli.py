"""The ``hylo`` command: every subcommand and every script in ``tools/`` leads to a ``main``."""

import ast
import os
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.waits import PATIENCE

from hylo_megatron import cli
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line


def hylo(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hylo_megatron", *argv], capture_output=True, text=True)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_has_a_main(name):
    path = ROOT / "hylo_megatron" / (cli.COMMANDS[name].module.replace(".", "/") + ".py")
    functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert "main" in functions


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_a_tool_is_an_alias_of_a_command(tool):
    called = re.findall(r'run\("([a-z0-9-]+)"\)|"hylo_megatron", "([a-z0-9-]+)"', (ROOT / "tools" / tool).read_text())
    assert len(called) == 1 and "".join(called[0]) in cli.COMMANDS


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


@pytest.mark.parametrize(
    "argv, message",
    [
        ("doctor --foo", "unrecognized arguments: --foo"),
        ("fetch-questions --out FILE/questions", "FILE: a file, expected a folder or the name of a new one"),
        ("fetch-text --out FILE", "FILE: a file, expected a folder or the name of a new one"),
        ("convert-amd --release nowhere --out made", "hybrid_config.json not found: expected the folder of a release"),
        ("serve-demo nowhere", "nowhere holds no exported model"),
        ("serve-demo FOLDER", "no vLLM here"),
        ("sample-text --teacher x --out y --tokens 1 --dtype z", "argument --dtype: invalid choice: 'z'"),
        ("fit-log-scale --model x --text y --device z", "--device z: cannot be used"),
        ("evaluate --model x --out y --prose FILE --context 1", "--context 1: expected 2 or more"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    """In the words of the command line, before anything is fetched, loaded or started."""

    def absent(*_):
        raise HyLoError("no vLLM here")

    monkeypatch.setattr("hylo_megatron.packages.require", absent)
    monkeypatch.setattr("hylo_megatron.corpus.questions.fetch_wheel", lambda *_: pytest.fail("has fetched"))
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("no JSON\n")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as ended:
        cli.main(argv.replace("FILE", str(file)).replace("FOLDER", str(folder)).split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    assert message.replace("FILE", str(file)) in error


def test_an_error_of_a_file_without_a_path_is_one_line(tmp_path, capsys):
    with (tmp_path / "file").open("w") as file, pytest.raises(SystemExit):
        command_line(os.listdir)(file.fileno())  # the error has the descriptor in the path's place
    assert capsys.readouterr().err.startswith("error: Not a directory (")


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


@pytest.fixture
def bare(tmp_path) -> str:
    """A Python of an environment in which nothing is installed."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return str(path)


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.sh"))
STARTS = [("bash", name) for name in EXAMPLES] + [("python", name) for name in EXAMPLES if "smollm2" not in name]


@pytest.mark.parametrize(("program", "name"), STARTS)
def test_an_example_without_its_environment_is_one_line(program, name, bare, tmp_path):
    """By bash, and by Python as torchrun starts the file, with nothing of the clone in PYTHONPATH."""
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"} | {"PYTHON": bare}
    command = [bare if program == "python" else program, str(ROOT / "examples" / name)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert f"which is not installed for {sys.executable}: activate the environment" in done.stderr


def test_a_package_that_is_missing_late_is_one_line(bare):
    """The command itself needs no package; what it imports to run does."""
    command = [bare, "-m", "hylo_megatron", "evaluate", "--model", "m", "--out", "o", "--prose", "p"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "error: hylo evaluate needs the package" in done.stderr


def test_a_python_that_is_too_old_is_one_line():
    old = "import sys; sys.version_info = (3, 9, 6); import hylo_megatron"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "error: hylo_megatron needs Python 3.11 or newer" in done.stderr


def test_a_command_ends_quietly_when_nobody_reads_its_output():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hylo_megatron", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


SERVER = """
import http.server, json, socket, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
try:
    socket.socket().bind(("127.0.0.1", int(given["--port"])))
    sys.exit("Error: any program could take the port")
except OSError:
    pass
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": given["--model"]}]}).encode())
http.server.HTTPServer(("127.0.0.1", int(given["--port"])), Models).serve_forever()
"""


def test_no_other_program_gets_the_port_of_the_demo(tmp_path, monkeypatch):
    from hylo_megatron.serve.demo import Server

    (tmp_path / "server.py").write_text(SERVER)
    monkeypatch.setattr(Server, "program", (sys.executable, str(tmp_path / "server.py")))
    server = Server(tmp_path / "model", tmp_path / "log", [], wait=PATIENCE)
    with server:
        assert server.process.poll() is None
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
