# Sourced by scripts/bitlm and scripts/test: installs the checkout into .venv at its root, once and
# again when what is installed changes. Sets ROOT. Messages go to stderr, pip's only if it fails.
# PYTHON names the interpreter to use (default python3).

ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export TOKENIZERS_PARALLELISM=false

# The CUDA kernels are for the cards of this machine; without one nobody could run them. A plain
# `pip install .` builds them for all cards wherever there is an nvcc.
_cuda_settings() {
    local cards
    cards=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null) || cards=""
    if [[ $cards =~ ^[0-9] ]]; then
        cards=$(tr -d '. ' <<< "$cards" | sort -un | paste -sd ';')
        echo "cmake.define.BITLM_CUDA_ARCHITECTURES=$cards"
    else
        echo "cmake.define.BITLM_CUDA=OFF"
    fi
}

# What the installation depends on, the place included: a virtual environment cannot be moved.
_wanted() {
    { echo "$ROOT"; _cuda_settings; cat -- "$ROOT/pyproject.toml" "$ROOT/bitlm_autoload.py" \
        "$ROOT/scripts/constraints.txt" "$ROOT"/bitlm/native/*; } | cksum
}

# The first line is what _wanted said, then the modules that an editable installation points to by
# name: one that is gone, become a package say, could not be imported.
_is_current() {
    local line
    [[ -f $ROOT/.venv/.bitlm-installed ]] || return 1
    {
        read -r line && [[ $line == "$1" ]] || return 1
        while read -r line; do [[ -f $ROOT/$line ]] || return 1; done
    } < "$ROOT/.venv/.bitlm-installed"
}

_record() {
    { echo "$1"; cd -- "$ROOT" && find bitlm -name '*.py'; } > "$ROOT/.venv/.bitlm-installed"
}

_native_line() {
    local files=("$ROOT"/.venv/lib/python*/site-packages/bitlm/libbitlm_cpu.*)
    if [[ -e ${files[0]} ]]; then
        echo "native library built"
    elif ! command -v "${CXX:-c++}" g++ clang++ > /dev/null; then
        echo "native library left out: no C++ compiler found (slower, same results)"
    else
        echo "native library left out: its build failed (slower, same results);" \
             "'.venv/bin/python -m pip install -v -e .' shows why"
    fi
}

# An environment from another place or from an interrupted run is replaced.
_environment() {
    local python=${PYTHON:-python3}
    if ! [[ -f $ROOT/.venv/.bitlm-root && $(< "$ROOT/.venv/.bitlm-root") == "$ROOT" ]] \
        || ! "$ROOT/.venv/bin/python" -m pip --version &> /dev/null
    then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "bitlm: '$python' is not Python 3.11 or newer; set PYTHON to one that is" >&2
            return 1
        fi
        rm -rf -- "$ROOT/.venv"
        "$python" -m venv "$ROOT/.venv" >&2
        echo "$ROOT" > "$ROOT/.venv/.bitlm-root"
    fi
}

_install() {
    local wanted=$1 log=$ROOT/.venv/.bitlm-install.log start=$SECONDS
    echo "bitlm: installing into $ROOT/.venv, which takes a minute or two" >&2
    rm -f -- "$ROOT/.venv/.bitlm-installed"
    _environment || exit
    if ! (cd -- "$ROOT" && PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install \
        -c scripts/constraints.txt -C "$(_cuda_settings)" -e ".[test,eval]") &> "$log"
    then
        tail -n 40 -- "$log" >&2
        echo "bitlm: pip could not install it; all it said is in $log" >&2
        exit 1
    fi
    echo "bitlm: installed in $((SECONDS - start)) s, $(_native_line)" >&2
    (_record "$wanted")
}

_setup() {
    local wanted
    wanted=$(_wanted)
    _is_current "$wanted" && return
    # One installation at a time; this file is only something to hold the lock on.
    exec 9< "${BASH_SOURCE[0]}"
    if command -v flock > /dev/null && ! flock -n 9; then
        echo "bitlm: waiting for another installation into $ROOT/.venv" >&2
        flock 9
    fi
    _is_current "$wanted" || _install "$wanted" 9<&-
    exec 9<&-
}

_setup
