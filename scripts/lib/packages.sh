# Packages of the system itself: few, listed, and installed only after a yes.
# shellcheck shell=bash

ASSUME_YES=${ASSUME_YES:-no}

# need_command COMMAND PACKAGE WHY: notes what is missing; install_missing then asks once for all of it.
MISSING_PACKAGES=()
MISSING_REASONS=()
need_command() {
    command -v "$1" >/dev/null 2>&1 && return
    MISSING_PACKAGES+=("$2")
    MISSING_REASONS+=("$3")
}

install_missing() {
    ((${#MISSING_PACKAGES[@]})) || return 0
    local i answer as_root=()
    command -v apt-get >/dev/null || die "missing: ${MISSING_PACKAGES[*]}; this is no Debian system, so please install them yourself"
    say "These packages of your distribution are missing:"
    for i in "${!MISSING_PACKAGES[@]}"; do
        say "  ${MISSING_PACKAGES[i]}: ${MISSING_REASONS[i]}"
    done
    if [[ $ASSUME_YES != yes ]]; then
        [[ -t 0 ]] || die "install them (apt-get install ${MISSING_PACKAGES[*]}), or run this script with --yes"
        read -r -p "Install them with apt-get? [y/N] " answer
        [[ $answer == [yY]* ]] || die "nothing was installed"
    fi
    if ((EUID != 0)); then
        command -v sudo >/dev/null || die "installing needs root: run 'apt-get install ${MISSING_PACKAGES[*]}' as root, then this script again"
        as_root=(sudo)
    fi
    step "installing ${MISSING_PACKAGES[*]}"
    local log
    mkdir -p "$TARGET"
    log=$TARGET/apt-install.log
    apt_install() {
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install "${MISSING_PACKAGES[@]}"
    }
    # The lists may be missing or too old on a new machine.
    { apt_install || { "${as_root[@]}" apt-get -q update && apt_install; }; } >"$log" 2>&1 </dev/null || {
        tail -n 15 "$log" >&2
        die "apt-get could not install ${MISSING_PACKAGES[*]}; the whole log is $log"
    }
    MISSING_PACKAGES=() MISSING_REASONS=()
}

# Sets PYTHON to a python3, if there is one to one that has Matplotlib, for plots. Those are a luxury: their package is
# installed only with --yes.
need_python() {
    local python
    need_command python3 python3 "runs the comparison"
    PYTHON=python3
    for python in python3 /usr/bin/python3; do
        ! "$python" -c 'import matplotlib' 2>/dev/null || { PYTHON=$python; return; }
    done
    [[ $ASSUME_YES == yes ]] || return 0
    MISSING_PACKAGES+=(python3-matplotlib) MISSING_REASONS+=("draws the plots")
    # Where it will be.
    PYTHON=/usr/bin/python3
}

need_rust() {
    [[ ! -f $HOME/.cargo/env ]] || command -v cargo >/dev/null || . "$HOME/.cargo/env"
    command -v cargo >/dev/null || die "cargo was not found: install the Rust toolchain (rustup.rs, or your distribution's if it is 1.88 or newer)"
    need_command cc gcc "the linker that cargo calls, and a C compiler"
    [[ -e /usr/include/stdlib.h ]] || { MISSING_PACKAGES+=(libc6-dev); MISSING_REASONS+=("what programs are linked with"); }
}
