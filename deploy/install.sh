#!/bin/sh
# Create .venv and install Baton into it. Safe to interrupt and to run again: finished downloads stay in pip's cache.
# PYTHON names the interpreter; otherwise the first of python3.11, python3.12, python3 that is 3.11 or 3.12.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
log=$venv/install.log
supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

find_python() {
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c "$supported" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Baton needs Python 3.11 or 3.12: install one, or name it with PYTHON=/path/to/python3.11" >&2
    exit 1
}

# step LABEL COMMAND...: run quietly, show that time passes, show the end of the log when it fails.
step() {
    label=$1
    shift
    printf '%s ' "$label"
    "$@" >>"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; echo; echo "interrupted: run the same command to go on" >&2; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 1
        ticks=$((${ticks:-0} + 1))
        [ $((ticks % 5)) -ne 0 ] || printf '.'
    done
    if wait "$pid"; then
        echo " done"
    else
        echo " failed"
        tail -n 20 "$log" >&2
        echo "full log: $log. Run the same command to go on: finished downloads are kept" >&2
        exit 1
    fi
    trap - INT TERM
}

if ! [ -x $venv/bin/python ] || ! $venv/bin/python -c "$supported"; then
    python=$(find_python)
    echo "Creating $venv with $("$python" --version)"
    "$python" -m venv $venv || {
        echo "could not create $venv: on Debian and Ubuntu install the python3-venv package" >&2
        exit 1
    }
fi
: >"$log"
pip="$venv/bin/python -m pip --disable-pip-version-check"
step "[1/4] pip" $pip install --upgrade "pip>=25.1"
step "[2/4] PyTorch (the largest download)" $pip install -c constraints.txt torch
step "[3/4] Baton and the rest" $pip install -c constraints.txt -e ".[router,cpu,cluster,bench,dev]"
step "[4/4] CPU kernels (compiled once)" $venv/bin/python -c "from llm_engine.ops.load import load_ops; load_ops('cpu')"
