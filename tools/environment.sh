# Sourced by the commands in this folder. It moves to the root of the checkout and offers
#
#   help_from_header                          print the comment at the head of the running command
#   environment FOLDER EXTRAS [REQUIREMENT..] see to it that the virtual environment FOLDER holds this
#                                             package, editable, with EXTRAS; sets $python to its Python,
#                                             and has compiled programs kept in FOLDER/compile-cache.
#                                             Where nothing has changed since, nothing is done.
#   quietly COMMAND..                         run it without the notes that TensorFlow starts with
#
# A new environment is made with $PYTHON, or else with python3.

_command=$(cd "$(dirname "$0")" && pwd)/${0##*/}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
_command=${_command#"$PWD"/}

export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
export PYTHONUNBUFFERED=1

help_from_header() {
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$_command"
}

quietly() {
    # TensorFlow writes these before it reads TF_CPP_MIN_LOG_LEVEL. Only stderr goes through the filter.
    local notes='^(WARNING: All log messages before absl::InitializeLog|I0000 )'
    { "$@" 2>&1 >&3 | { grep --line-buffered -vE "$notes" || true; } >&2; } 3>&1
}

environment() {
    _installed "$@" || return
    _keep_compiled_programs "$1"
}

_installed() {
    local folder=$1 extras=$2
    shift 2
    python=$PWD/$folder/bin/python

    local version wanted
    version=$(_version_of "$python" 2>/dev/null) || version=
    # A Python that is named wins over the one that the environment was made with.
    if [[ -n ${PYTHON:-} ]]; then
        wanted=$(_version_of "$PYTHON") || return
        [[ $wanted == "$version" ]] || version=
    fi

    # One stamp for each set of extras: tools/demo and tools/test share an environment, and what one of
    # them installs does not undo what the other did.
    local stamp=$folder/installed-$extras
    if [[ -n $version && -f $stamp && $(<"$stamp") == "$(_fingerprint "$version" "$@")" ]]; then
        return
    fi

    if [[ -z $version ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
        _new_enough "${PYTHON:-python3}" || return
        echo "[1/3] making $folder ..."
        if ! "${PYTHON:-python3}" -m venv --clear "$folder"; then
            rm -rf "$folder"
            echo "${PYTHON:-python3} could not make $folder: see the lines above." >&2
            return 1
        fi
        version=$(_version_of "$python")
    else
        echo "[1/3] $folder is there"
    fi

    echo "[2/3] installing keras-xent[$extras]${*:+ with $*} for Python $version (minutes, the first time) ..."
    if ! "$python" -m pip install --no-input --disable-pip-version-check --log "$folder/pip.log" \
        --editable ".[$extras]" "$@" </dev/null 2>&1 | _progress; then
        echo "The installation failed: see the lines above, and $folder/pip.log." >&2
        echo "Where pip finds no TensorFlow for Python $version, name another: PYTHON=python3.12 $_command" >&2
        return 1
    fi

    echo "[3/3] importing what was installed ..."
    KERAS_BACKEND=tensorflow quietly "$python" -c '
import keras, tensorflow
print(f"      TensorFlow {tensorflow.__version__}, Keras {keras.__version__}")' || return
    _fingerprint "$version" "$@" >"$stamp"
}

# Compiled programs are kept from one process to the next, which changes no result. What the user has set stays: of two
# values of a flag XLA takes the later.
_keep_compiled_programs() {
    local caches=$PWD/$1/compile-cache cache most=2000
    cache=$caches/$(_compilers) || return
    # Programs of other versions are of no use any more; those of old sources are few until there are gigabytes.
    find "$caches" -mindepth 1 -maxdepth 1 ! -path "$cache" -exec rm -rf {} + 2>/dev/null || true
    if [[ $(du -sm "$cache" 2>/dev/null | cut -f1) -gt $most ]]; then
        rm -rf "$cache"
    fi
    mkdir -p "$cache/tensorflow" "$cache/jax"
    local flags="--tf_xla_persistent_cache_directory=$cache/tensorflow"
    # TensorFlow splits its flags at spaces, and knows no quotes.
    [[ $cache == *[[:space:]]* ]] || export TF_XLA_FLAGS="$flags${TF_XLA_FLAGS:+ $TF_XLA_FLAGS}"
    export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$cache/jax}"
    # Else only programs that take over a second to compile are kept.
    export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
}

# The versions of the compilers, and the processor that they compile for: "tensorflow-2.21.0-jax-0.10.2-1234".
_compilers() {
    "$python" - <<'PYTHON'
import importlib.metadata
import pathlib
import platform
import zlib

names = []
for name in "tensorflow", "jax":
    try:
        names.append(f"{name}-{importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        continue
cpuinfo = pathlib.Path("/proc/cpuinfo")
lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
processor = [platform.machine(), *sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})]
print(*names, zlib.crc32("\n".join(processor).encode()), sep="-")
PYTHON
}

_version_of() {
    "$1" -c 'import platform; print(platform.python_version())'
}

# Asked before anything is removed or downloaded: pip would say so only after TensorFlow's 600 MB.
_new_enough() {
    local least
    least=$(sed -n 's/^python_requires = >=//p' setup.cfg)
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < tuple(map(int, sys.argv[1].split("."))))' "$least"; then
        echo "keras_xent needs Python $least or newer, and $1 is $(_version_of "$1")." >&2
        echo "Name a newer one: PYTHON=python3.12 $_command" >&2
        return 1
    fi
}

_fingerprint() {
    { echo "$PWD" "$@"; cat setup.cfg pyproject.toml; } | cksum
}

# Of pip's many lines, those that show it moving, and everything from an error on.
_progress() {
    local line failed=
    while IFS= read -r line; do
        case $line in
            ERROR:* | *error:* | 'The conflict is'*) failed=yes ;;
        esac
        case $line in
            *Downloading* | *'Using cached'* | 'Installing collected'*) ;;
            *) [[ -n $failed ]] || continue ;;
        esac
        printf '      %.100s\n' "$line"
    done
}
