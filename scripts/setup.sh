# Sourced by scripts/bitlm and scripts/test: installs the checkout into .venv at its root, once and
# again after a change of what is installed. Sets ROOT. Messages go to stderr.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export TOKENIZERS_PARALLELISM=false

# What the installation depends on, the place included: a virtual environment cannot be moved.
_wanted() {
    { echo "$ROOT"; cat -- "$ROOT/pyproject.toml" "$ROOT/scripts/constraints.txt" \
        "$ROOT"/bitlm/native/*; } | cksum
}

_is_current() {
    [[ -f $ROOT/.venv/.bitlm-installed && $(< "$ROOT/.venv/.bitlm-installed") == "$1" ]]
}

_native_line() {
    local files=("$ROOT"/.venv/lib/python*/site-packages/bitlm/libbitlm_cpu.*)
    if [[ -e ${files[0]} ]]; then
        echo "bitlm: native library built"
    elif ! command -v "${CXX:-c++}" g++ clang++ > /dev/null; then
        echo "bitlm: native library left out: no C++ compiler found (slower, same results)"
    else
        echo "bitlm: native library left out: its build failed (slower, same results);" \
             "'.venv/bin/python -m pip install -v -e .' shows why"
    fi
}

_install() {
    local wanted=$1 python=$ROOT/.venv/bin/python
    echo "bitlm: installing into .venv, which takes a minute or two" >&2
    rm -f -- "$ROOT/.venv/.bitlm-installed"
    # Left by another place or an interrupted run: an environment that cannot install is replaced.
    if ! grep -qsF -- "$ROOT" "$ROOT/.venv/.bitlm-root" || ! "$python" -m pip --version &> /dev/null
    then
        rm -rf -- "$ROOT/.venv"
        python3 -m venv "$ROOT/.venv"
        echo "$ROOT" > "$ROOT/.venv/.bitlm-root"
    fi
    (cd -- "$ROOT" && PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$python" -m pip install -q -c scripts/constraints.txt -e ".[test,eval]" >&2)
    _native_line >&2
    echo "$wanted" > "$ROOT/.venv/.bitlm-installed"
}

_setup() {
    local wanted
    wanted=$(_wanted)
    _is_current "$wanted" && return
    # One installation at a time; this file is only something to hold the lock on.
    exec 9< "${BASH_SOURCE[0]}"
    if command -v flock > /dev/null; then flock 9; fi
    _is_current "$wanted" || _install "$wanted" 9<&-
    exec 9<&-
}

_setup
