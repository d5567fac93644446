#!/usr/bin/env bash
# Makes this checkout ready for work: config/setup.sh, or `make setup`.
#
# 1. Debian packages from config/debian-packages.txt that are missing: root
#    installs them, anyone else is told the command. Without apt it only checks
#    for the tools and headers.
# 2. .venv with casfs (editable) and its extras fuse, serve, test and dev, at the
#    versions of config/constraints.txt.
#
# A stamp in .venv says what it was made from; while that is unchanged, setup
# does nothing. The stamp is written last, so an interrupted setup starts over.
# It starts over too if the checkout was moved, or python3 is another one.
#
# PYTHON chooses the interpreter (3.11 or newer); default: python3 on the PATH.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

PYTHON=${PYTHON:-python3}
STAMP=.venv/casfs-setup.stamp

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# One line for the interpreter and the place, one for the inputs.
describe_wanted() {
    printf '%s at %s\n' "$python" "$PWD"
    cat pyproject.toml config/constraints.txt config/setup.sh config/debian-packages.txt | sha256sum
}

is_done() {
    [[ -x .venv/bin/python && -f $STAMP && $(<"$STAMP") == "$wanted" ]]
}

# The packages of a kind, "essential" or "optional", in the order of the file.
list_packages() {
    local name mark rest
    while read -r name mark rest; do
        [[ -z $name || $name == '#'* ]] && continue
        if [[ ${rest%% *} == optional: ]]; then
            [[ $1 == optional ]] && echo "$name"
        elif [[ $1 == essential ]]; then
            # An interpreter from elsewhere (pyenv, say) brings these itself.
            [[ $name == python3-* && -n $python_complete ]] || echo "$name"
        fi
    done <config/debian-packages.txt
    return 0
}

keep_missing() {
    local name
    while read -r name; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || echo "$name"
    done
}

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 "$@" >&2; }

install_packages() {
    local essential optional name
    mapfile -t essential < <(list_packages essential | keep_missing)
    mapfile -t optional < <(list_packages optional | keep_missing)
    ((${#essential[@]} + ${#optional[@]})) || return 0
    if ((EUID)); then
        say "Debian packages are missing. As root, run:"
        say "  apt-get install ${essential[*]} ${optional[*]}"
        ((${#essential[@]} == 0)) || fail "without ${essential[*]} this can't go on"
        return 0
    fi
    say "installing ${essential[*]} ${optional[*]}"
    apt_get update || say "apt-get update failed; trying with the lists there are"
    if ((${#essential[@]})); then
        apt_get install --no-install-recommends "${essential[@]}" || fail "apt-get could not install ${essential[*]}"
    fi
    for name in "${optional[@]}"; do
        apt_get install --no-install-recommends "$name" || say "no package $name here; tests that need it will skip"
    done
}

check_tools() {
    local name missing=()
    for name in gcc make git pkg-config fusermount3; do
        command -v "$name" >/dev/null || missing+=("$name")
    done
    pkg-config --exists fuse3 2>/dev/null || missing+=("the headers of libfuse 3")
    [[ -n $python_complete ]] || missing+=("Python.h and ensurepip for $python")
    if ((${#missing[@]})); then
        say "there is no apt here: install these with what this system has (names as in Debian)"
        grep -v -e '^#' -e '^$' config/debian-packages.txt | sed 's/^/setup:   /'
        fail "missing:" "${missing[@]/#/  }"
    fi
}

make_venv() {
    local before=''
    [[ -f $STAMP ]] && before=$(head -n 1 "$STAMP")
    rm -f "$STAMP"
    # Only a finished venv of the same interpreter in the same place is built upon.
    if [[ $before != "${wanted%%$'\n'*}" ]]; then
        say "making .venv with $python"
        "$PYTHON" -m venv --clear .venv || fail "$PYTHON -m venv failed (Debian: apt-get install python3-venv)"
    fi
    local pip=(.venv/bin/python -m pip --disable-pip-version-check --no-input install -q -c config/constraints.txt)
    # First and alone, because it is the one that is compiled.
    "${pip[@]}" pyfuse3 || fail \
        "pyfuse3 could not be built or fetched; pip says why above. It needs gcc, pkg-config," \
        "the headers of libfuse 3 (Debian: libfuse3-dev) and those of $python (Debian: python3-dev)"
    say "installing casfs and what it needs"
    "${pip[@]}" -e '.[fuse,serve,test,dev]' || fail "pip could not install casfs; it says why above"
}

python=$("$PYTHON" -c 'import sys; print("Python %d.%d.%d" % sys.version_info[:3], sys.executable)') ||
    fail "can't run $PYTHON: casfs needs Python 3.11 or newer; set PYTHON to one"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is too old: casfs needs 3.11 or newer; set PYTHON to one"
wanted=$(describe_wanted)
is_done && exit 0

# Two terminals must not fill one .venv at a time.
exec 9<config/setup.sh
flock 9
is_done && exit 0

python_complete=$("$PYTHON" -c '
import os, sysconfig, venv
import ensurepip
if os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("yes")' 2>/dev/null) || true
if command -v apt-get >/dev/null && command -v dpkg-query >/dev/null; then
    install_packages
else
    check_tools
fi
make_venv
printf '%s\n' "$wanted" >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
say "ready; try: make test"
