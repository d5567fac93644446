#!/usr/bin/env bash
# Makes the Go programs of config/bench-go-modules.txt, and the one of tools/bench/fleet,
# in .venv/bin: `make bench-tools`.
#
# What is there in the named version, or of the same sources, is left alone, so a
# second run does nothing.
# Without Go, or where a module can't be fetched, it says so and ends well: the
# benchmark notes what it couldn't measure, and tests that need the program say
# that it is lacking.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

say() { printf 'bench-tools: %s\n' "$*"; }

while read -r module _; do
    [[ -z $module || $module == '#'* ]] && continue
    program=${module##*/}
    program=${program%@*}
    target=.venv/bin/$program
    [[ -x $target && $(cat "$target.module" 2>/dev/null) == "$module" ]] && continue
    if ! command -v go >/dev/null; then
        say "there is no go, which would make $program: what needs it is left out"
        continue
    fi
    say "making $program"
    if GOBIN=$PWD/.venv/bin go install "$module"; then
        printf '%s\n' "$module" >"$target.module"
    else
        say "go could not make $program: what needs it is left out"
    fi
done <config/bench-go-modules.txt

sources=tools/bench/fleet
target=.venv/bin/casfs-fleet
made_of=$(cat "$sources"/go.mod "$sources"/go.sum "$sources"/*.go | sha256sum)
if [[ ! -x $target || $(cat "$target.sources" 2>/dev/null) != "$made_of" ]]; then
    if ! command -v go >/dev/null; then
        say "there is no go, which would make casfs-fleet: what needs it is left out"
    else
        say "making casfs-fleet"
        if go -C "$sources" build -trimpath -o "$PWD/$target" .; then
            printf '%s\n' "$made_of" >"$target.sources"
        else
            say "go could not make casfs-fleet: what needs it is left out"
        fi
    fi
fi
