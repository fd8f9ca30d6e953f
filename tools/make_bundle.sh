#!/usr/bin/env bash
# Packs what a run needs on a machine without network, in parts small enough to be sent one at a time:
#   tools/make_bundle.sh --out w/bundle --with-repo --wheels "megatron-core==0.19.2" w/hf w/train.bin w/train.idx
# PATH or PATH=NAME     a file or folder, packed as NAME (default: its base name); a *.whl counts as a wheel
# --wheels "REQ ..."    wheels for Linux x86-64 and CPython --platform-python (3.12), without their dependencies
# --with-repo           this repository at HEAD, as `repo`
# --part-size 56M       of each part at most (K, M, G are powers of 1024)
# --compress gzip       or none, xz, zstd: the receiving machine needs the same tool
# The folder then holds part-000, part-001, ..., MANIFEST and join_bundle.sh, which puts it all together again.
# The same inputs give the same bytes, from the same version of the compressor. HYLO_PYTHON picks the Python with pip.
set -euo pipefail
export LC_ALL=C # one order of names everywhere

tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage='usage: tools/make_bundle.sh --out DIR [--part-size 56M] [--wheels "REQ ..."] [--platform-python 3.12]
       [--with-repo] [--compress gzip|none|xz|zstd] PATH[=NAME] ...'
die() {
    echo "error: $*" >&2
    exit 1
}

out='' part_size=56M python_version=3.12 with_repo=no
# gzip is on every machine: tokens shrink to 60 %, bf16 weights to 74 %, wheels not at all, at 30 MB/s a core here and
# 120 MB/s there. A faster link wants none; zstd does the same as gzip at 100 MB/s, where both ends have it.
compress=gzip
requirements=() paths=()
while [ $# -gt 0 ]; do
    case $1 in
        --out | --part-size | --wheels | --platform-python | --compress)
            [ $# -ge 2 ] || die "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --part-size) part_size=$2 ;;
                --wheels) read -r -d '' -a words <<<"$2" || true; requirements+=("${words[@]}") ;;
                --platform-python) python_version=$2 ;;
                --compress) compress=$2 ;;
            esac
            shift 2
            ;;
        --with-repo) with_repo=yes; shift ;;
        -*) echo "$usage" >&2; exit 2 ;;
        *) paths+=("$1"); shift ;;
    esac
done
if [ -z "$out" ] || { [ $with_repo = no ] && [ ${#requirements[@]} -eq 0 ] && [ ${#paths[@]} -eq 0 ]; }; then
    echo "$usage" >&2
    exit 2
fi
[[ $part_size =~ ^[1-9][0-9]*[KMG]?$ ]] || die "--part-size $part_size: expected a number such as 56M (or K, G)"
[[ $python_version =~ ^3\.[0-9]+$ ]] || die "--platform-python $python_version: expected a version like 3.12"
case $compress in # a fixed number of threads: it can change the bytes
    gzip) suffix=.gz compressor=(gzip -1 -n) ;;
    xz) suffix=.xz compressor=(xz -1 -T2) ;;
    zstd) suffix=.zst compressor=(zstd -q -3 -T2) ;;
    none) suffix='' compressor=(cat) ;;
    *) die "--compress $compress: expected gzip, none, xz or zstd" ;;
esac
command -v "${compressor[0]}" >/dev/null || die "there is no ${compressor[0]} here: choose another --compress"
out=$(realpath -m -- "$out")
[ ! -e "$out" ] || die "$out exists: remove it or choose another --out"

partial=$out.partial
stage=$partial/stage # links to the inputs under their names in the bundle
rm -rf -- "$partial"
mkdir -p -- "$stage"

add_path() { # PATH or PATH=NAME
    local path=$1 name='' folder=$stage
    if [ ! -e "$path" ] && [[ $path == *=* ]]; then
        name=${path##*=} path=${path%=*}
        [ -n "$name" ] || die "$1: NAME is empty"
    fi
    [ -e "$path" ] || die "$path: no such file or folder"
    if [ -z "$name" ]; then
        name=$(basename -- "$(realpath -s -- "$path")")
        if [[ $name == *.whl && -f $path ]]; then folder=$stage/wheels; fi
    fi
    path=$(realpath -- "$path")
    [[ $out/ != "${path%/}"/* ]] || die "$1 contains --out: choose a DIR outside of it"
    case $name in
        */* | . | ..) die "$1: NAME is to be one name, without '/' or '..'" ;;
        repo | wheels | site | venv | pip.log | .bundle | *.partial)
            die "$1: '$name' is a name of the bundle's own: give PATH=NAME"
            ;;
    esac
    mkdir -p -- "$folder"
    [ ! -e "$folder/$name" ] || die "$1: '$name' is packed already: give PATH=NAME"
    ln -s -- "$path" "$folder/$name"
}

fetch_wheels() { # the oldest platform first: of several wheels take the one that runs on the most machines
    local python=${HYLO_PYTHON:-python3} log=$partial/pip.log minor platforms=(--platform manylinux2014_x86_64)
    for minor in {5..34}; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
    "$python" -c "import pip" >/dev/null 2>&1 || die "$python has no pip, which --wheels needs: set HYLO_PYTHON"
    "$python" -m pip download -q --disable-pip-version-check --no-input --no-deps --only-binary=:all: \
        --implementation cp --python-version "$python_version" "${platforms[@]}" --dest "$stage/wheels" \
        "${requirements[@]}" >"$log" 2>&1 ||
        die "pip found no wheels: $(grep -i error "$log" | tail -n 1) (all of pip's words: $log)"
    rm -f -- "$log"
}

add_repo() {
    local root=$tools/.. answer
    answer=$(git -C "$root" rev-parse --verify 'HEAD^{commit}' 2>&1) || die "--with-repo: git says: ${answer%%$'\n'*}"
    mkdir -p -- "$stage/repo"
    git -C "$root" archive HEAD | tar -x -C "$stage/repo"
    if [ -n "$(git -C "$root" --no-optional-locks status --porcelain --untracked-files=no)" ]; then
        echo "make_bundle: the repository is packed at HEAD: changes that are not committed are left out" >&2
    fi
}

if [ ${#requirements[@]} -gt 0 ]; then fetch_wheels; fi
if [ $with_repo = yes ]; then add_repo; fi
for path in ${paths[@]+"${paths[@]}"}; do add_path "$path"; done

# The bundle holds files and folders only, so that unpacking cannot lead anywhere: links are followed here, once.
odd=$(find -L "$stage" ! -type f ! -type d -print -quit) || die "the files cannot be listed"
[ -z "$odd" ] || die "${odd#"$stage/"} is neither a file nor a folder (a link to nowhere?)"
log=$partial/log
{ tar --create --format=gnu --dereference --hard-dereference --sort=name --mtime=@0 --owner=0 --group=0 \
    --numeric-owner --mode='u=rwX,go=rX' --directory "$stage" . | "${compressor[@]}" |
    split --bytes="$part_size" --numeric-suffixes --suffix-length=3 - "$partial/part-"; } 2>"$log" ||
    die "the bundle was not written: $(head -n 1 "$log") (more than 1000 parts? then raise --part-size)"
rm -rf -- "$stage" "$log"

cd -- "$partial"
bytes=0
for part in part-*; do
    sum=$(sha256sum <"$part")
    size=$(stat -c %s "$part")
    bytes=$((bytes + size))
    echo "${sum%% *} $size $part"
done >MANIFEST
sum=$(cat part-* | sha256sum)
echo "${sum%% *} $bytes bundle.tar$suffix" >>MANIFEST
cp -- "$tools/join_bundle.sh" .
mv -T -- "$partial" "$out"
count=$(($(wc -l <"$out/MANIFEST") - 1))
echo "make_bundle: $out, parts: $count, together $(numfmt --to=iec "$bytes"); there: bash join_bundle.sh --to TARGET"
