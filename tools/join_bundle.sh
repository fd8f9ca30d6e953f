#!/usr/bin/env bash
# Puts the parts that tools/make_bundle.sh made together again, on a machine without network:
#   bash join_bundle.sh --to TARGET [-- python3 -m hylo_megatron.train ...]
# --from DIR       where the parts and MANIFEST lie (default: beside this script); they may come in any order
# --to TARGET      the new folder; one that holds this very bundle is taken as it is
# --site | --venv  installs the wheels into TARGET/site, for PYTHONPATH (default), or into an environment TARGET/venv;
#                  either way the packages that python3 already has, torch above all, stay in sight
# -- COMMAND ...   then runs COMMAND in TARGET/repo (TARGET if the repository was not packed) with these packages
# Prints the line that does the same for a shell, and nothing else, to stdout. Run it again after any error.
# Needs bash 4, GNU coreutils, findutils and tar, the bundle's decompressor and, for wheels, a python3 with pip
# (HYLO_PYTHON picks another).
set -euo pipefail

usage='usage: join_bundle.sh [--from DIR] --to TARGET [--site | --venv] [-- COMMAND ...]'
note() { echo "join_bundle: $*" >&2; }
die() {
    echo "error: $*" >&2
    exit 1
}

from=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target='' kind=site python=${HYLO_PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
        --from | --to)
            [ $# -ge 2 ] || die "$1 needs a value"
            if [ "$1" = --to ]; then target=$2; else from=$2; fi
            shift 2
            ;;
        --site | --venv) kind=${1#--}; shift ;;
        --) shift; break ;; # what is left is COMMAND
        *) echo "$usage" >&2; exit 2 ;;
    esac
done
if [ -z "$target" ]; then
    echo "$usage" >&2
    exit 2
fi
target=$(realpath -m -- "$target")

parts=() sizes=() sums=() total='' stream=''
read_manifest() { # lines `sha256 size name`: the parts in their order, and last the stream that they make
    local sum size name bytes=0 expected
    [ -f "$from/MANIFEST" ] || die "missing: MANIFEST in $from (bring it and run this again)"
    while read -r sum size name || [ -n "$sum" ]; do
        expected=$(printf 'part-%03d' ${#parts[@]})
        [[ -z $total && "$sum $size" =~ ^[0-9a-f]{64}\ [0-9]+$ && $name =~ ^($expected|bundle\.tar(\.[a-z]+)?)$ ]] ||
            die "$from/MANIFEST is damaged at '${name:-$sum}' (bring it again and run this again)"
        if [ "$name" = "$expected" ]; then
            parts+=("$name") sizes+=("$size") sums+=("$sum") bytes=$((bytes + size))
        else
            total=$sum stream=$name
            [ "$size" -eq "$bytes" ] || die "$from/MANIFEST lacks a part (bring it again and run this again)"
        fi
    done <"$from/MANIFEST"
    [ -n "$total" ] || die "$from/MANIFEST ends early (bring it again and run this again)"
}

check_parts() {
    local i file size sum whole=yes
    for i in "${!parts[@]}"; do
        file=$from/${parts[i]}
        if [ ! -f "$file" ]; then
            echo "missing: ${parts[i]} (bring it and run this again)" >&2
            whole=no
            continue
        fi
        size=$(stat -L -c %s -- "$file")
        sum=''
        if [ "$size" = "${sizes[i]}" ]; then sum=$(sha256sum <"$file"); fi
        if [ "${sum%% *}" != "${sums[i]}" ]; then
            echo "damaged: ${parts[i]}, $size of ${sizes[i]} bytes (bring it again and run this again)" >&2
            whole=no
        fi
    done
    [ $whole = yes ] || exit 1
}

unpack() {
    local partial=$target.partial decompress log sum why odd
    case $stream in
        *.tar) decompress=(cat) ;;
        *.gz) decompress=(gzip -dc) ;;
        *.xz) decompress=(xz -dc) ;;
        *.zst) decompress=(zstd -dcq) ;;
        *) die "$from/MANIFEST names $stream: expected bundle.tar, .gz, .xz or .zst" ;;
    esac
    command -v "${decompress[0]}" >/dev/null ||
        die "there is no ${decompress[0]} here: make the bundle again with another --compress"
    rm -rf -- "$partial"
    mkdir -p -- "$partial"
    log=$(mktemp) # not on the disk that may fill up
    # The stream is hashed while it is unpacked. tar itself drops a leading `/` or `../`: such names are an error here.
    sum=$({ cat -- "${parts[@]/#/$from/}" | tee /dev/fd/3 | "${decompress[@]}" |
        tar -xv --no-same-owner --no-same-permissions -C "$partial" |
        { if grep -E '^/|(^|/)\.\.(/|$)' >&2; then exit 1; fi; }; } 3>&1 2>"$log" | sha256sum) || {
        why=$(head -n 1 -- "$log")
        rm -rf -- "$partial" "$log"
        die "the bundle does not unpack: $why (if it is not the disk, make the bundle again)"
    }
    rm -f -- "$log"
    [ "${sum%% *}" = "$total" ] || die "the parts make another stream than MANIFEST says (bring MANIFEST again)"
    odd=$(find "$partial" ! -type f ! -type d -print -quit)
    [ -z "$odd" ] || die "the bundle holds $odd, which is neither a file nor a folder: make the bundle again"
    echo "$total" >"$partial/.bundle"
    mv -T -- "$partial" "$target" # takes the place of an empty folder, too
    note "unpacked $target"
}
unpacked() { [ -f "$target/.bundle" ] && [ "$(cat -- "$target/.bundle")" = "$total" ]; }

pip_install() { # PIP ... -- OPTION ...; --isolated because containers come with PIP_CONSTRAINT and the like
    local pip=() log=$target/pip.log
    while [ "$1" != -- ]; do pip+=("$1"); shift; done
    shift
    mkdir -p -- "$target/pip.partial" # pip moves from TMPDIR: on the same disk that costs nothing
    TMPDIR=$target/pip.partial "${pip[@]}" install -q --isolated --disable-pip-version-check --no-input \
        --no-index --no-deps --no-compile "$@" "$target"/wheels/*.whl >"$log" 2>&1 ||
        die "pip did not install the wheels: $(grep -i error "$log" | tail -n 1) (all of pip's words: $log)"
    rm -rf -- "$target/pip.partial" "$log"
}

install_site() {
    rm -rf -- "$target/site.partial"
    pip_install "$python" -m pip -- --target "$target/site.partial"
    mv -T -- "$target/site.partial" "$target/site"
}

install_venv() { # its own packages first, then what $python sees, even if that is an environment itself
    local packages
    "$python" -m venv --clear --without-pip "$target/venv" || die "$python -m venv failed: install without --venv"
    pip_install "$python" -m pip --python "$target/venv/bin/python" --
    packages=$("$target/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import site
for folder in site.getsitepackages() + [site.getusersitepackages()] * bool(site.ENABLE_USER_SITE):
    print(f"import site; site.addsitedir({folder!r})")' >"$packages/node.pth"
    touch -- "$target/venv/.whole"
}

install_wheels() {
    "$python" -c "import pip" >/dev/null 2>&1 || die "$python has no pip, which wheels need: set HYLO_PYTHON"
    "install_$kind"
    note "installed $target/$kind"
}
installed() {
    local result=$target/site # appears when it is whole
    if [ "$kind" = venv ]; then result=$target/venv/.whole; fi
    [ ! -d "$target/wheels" ] || [ -e "$result" ]
}

read_manifest
if unpacked && installed; then
    note "$target: done before"
else
    mkdir -p -- "$(dirname -- "$target")"
    exec 9>"$target.lock" # nodes that share a disk may all start this: one works, the others find it done
    if command -v flock >/dev/null; then flock 9; fi
    if ! unpacked; then
        if [ -e "$target" ] && { [ ! -d "$target" ] || [ -n "$(ls -A -- "$target")" ]; }; then
            die "$target exists and is not this bundle: remove it or choose another --to"
        fi
        check_parts
        unpack
    fi
    installed || install_wheels
    exec 9>&-
fi

python_path=''
if [ "$kind" = site ] && [ -d "$target/site" ]; then python_path=$target/site; fi
if [ -d "$target/repo" ]; then python_path=${python_path:+$python_path:}$target/repo; fi
exports=()
if [ "$kind" = venv ] && [ -d "$target/venv" ]; then exports+=("PATH=$(printf %q "$target/venv/bin"):\$PATH"); fi
if [ -n "$python_path" ]; then exports+=("PYTHONPATH=$(printf %q "$python_path")\${PYTHONPATH:+:\$PYTHONPATH}"); fi
if [ ${#exports[@]} -gt 0 ]; then
    echo "export ${exports[*]}"
    eval "export ${exports[*]}"
fi
if [ $# -gt 0 ]; then
    if [ -d "$target/repo" ]; then cd -- "$target/repo"; else cd -- "$target"; fi
    exec "$@"
fi
