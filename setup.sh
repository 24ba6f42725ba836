#!/usr/bin/env bash
# source ./setup.sh             the environment, made where it is missing and active in this shell (bash or zsh); with
#                               ATELIER_BUCKET=gs://... the bucket's datasets/ and checkpoints/ too
# ./setup.sh push runs/NAME     to the bucket, and `pull NAME`, `bring` (data sets and checkpoints), `status`; each takes
#                               --dry-run, which alone is that of `bring`
#
# Sourced, it changes nothing in the shell but what activating an environment does, and never ends it.

_atelier_say() { printf 'setup: %s\n' "$1" >&2; }

# _atelier_conda HERE: make the conda environment of environment.yaml where it is missing, and activate it.
_atelier_conda() {
    local name
    name=$(sed -n 's/^name: *//p' "$1/environment.yaml")
    eval "$(conda shell.posix hook)"
    # A marker, as .venv/core is one: an environment that was left half-made does not count.
    if [ ! -f "$1/.conda-made" ] || [ "$1/pyproject.toml" -nt "$1/.conda-made" ] || ! conda activate "$name" 2>/dev/null; then
        _atelier_say "making the conda environment $name: minutes, once"
        if (cd "$1" && { conda env create -q -f environment.yaml || conda env update -q -n "$name" -f environment.yaml; } >&2); then
            touch "$1/.conda-made"
            conda activate "$name"
        elif conda activate "$name" 2>/dev/null; then
            _atelier_say "the conda environment $name was not brought up to date: as it is"
        else
            return 1
        fi
    fi
}

# _atelier_venv HERE: the same with `make env` and .venv.
_atelier_venv() {
    if [ -L "$1/.venv" ] || { [ -f "$1/.venv/core" ] && ! command -v make >/dev/null 2>&1; }; then
        : # somebody else's, or it cannot be looked after here: as it is
    elif (cd "$1" && make --question env >/dev/null 2>&1); then
        :
    elif [ -f "$1/.venv/core" ]; then
        _atelier_say "bringing the environment .venv up to date"
        (cd "$1" && make env >&2) || _atelier_say "the environment .venv was not brought up to date: as it is"
    else
        if ! command -v make >/dev/null 2>&1 || ! "${PYTHON:-python3}" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            _atelier_say "neither conda nor make and a python3 with venv is here: install one of them (Debian: apt install make python3-venv)"
            return 2
        fi
        _atelier_say "making the environment .venv: minutes, once"
        (cd "$1" && make env >&2) || return 1
    fi
    # shellcheck source=/dev/null
    . "$1/.venv/bin/activate"
}

# _atelier_setup HERE [COMMAND ...]: the environment, then what the bucket has, or what COMMAND asks of it.
_atelier_setup() {
    local here=$1 brought=0
    shift
    if command -v conda >/dev/null 2>&1; then _atelier_conda "$here"; else _atelier_venv "$here"; fi || {
        local status_=$?
        _atelier_say "the environment was not made"
        return "$status_"
    }
    case ${1:-} in --*) set -- bring "$@" ;; esac
    if [ $# -gt 0 ]; then
        (cd "$here" && python -m src.storage.buckets "$@")
        return
    elif [ -n "${ATELIER_BUCKET:-}" ]; then
        (cd "$here" && python -m src.storage.buckets bring) || {
            brought=$?
            _atelier_say "the bucket brought nothing, or not all"
        }
    else
        _atelier_say "set ATELIER_BUCKET=gs://... to bring datasets and checkpoints too"
    fi
    if [ -n "$_atelier_sourced" ]; then
        _atelier_say "the environment is active" # which is what a shell sources it for: status 0, whatever was brought
    else
        _atelier_say "the environment is there; \`source ./setup.sh\` makes it active in your shell"
        return "$brought"
    fi
}

if [ -n "${ZSH_VERSION:-}" ]; then
    case "$ZSH_EVAL_CONTEXT" in *:file*) _atelier_sourced=1 ;; *) _atelier_sourced= ;; esac
    eval '_atelier_here=${${(%):-%x}:a:h}'
else
    [ "${BASH_SOURCE[0]}" != "$0" ] && _atelier_sourced=1 || _atelier_sourced=
    _atelier_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fi
if [ -n "$_atelier_sourced" ]; then # arguments here are those of whoever sources it
    if _atelier_setup "$_atelier_here"; then _atelier_status=0; else _atelier_status=$?; fi
    unset -f _atelier_say _atelier_conda _atelier_venv _atelier_setup
    unset _atelier_here _atelier_sourced

    case $- in *e*) _atelier_status=0 ;; esac # where a failure ends the shell: it has been said
    eval "unset _atelier_status; return $_atelier_status"
fi
_atelier_setup "$_atelier_here" "$@"
