# Programs of Debian 13 (QEMU 10, fio, e2fsprogs, busybox, a kernel), whatever the system is, without installing any.
# shellcheck shell=bash
#
# The packages are fetched through apt with a directory of its own, verified by Debian's keyring, and unpacked under
# $PROVISION/trixie. No maintainer script runs, no root is needed, the system and its apt sources stay as they are.
# A program runs in place, by its own dynamic loader and libraries: it sees the system's files, sockets and devices.

TRIXIE=$PROVISION/trixie
TRIXIE_PACKAGES=(qemu-system-x86 qemu-utils qemu-block-extra fio e2fsprogs util-linux busybox-static)
# The kernel's package by the name that never changes; its dependency is the kernel itself.
TRIXIE_KERNEL=linux-image-cloud-amd64
# Change this when the way of unpacking changes, so that old ones are made anew.
TRIXIE_FORMAT=1

provide_trixie() {
    local wanted="$TRIXIE_FORMAT ${TRIXIE_PACKAGES[*]} $TRIXIE_KERNEL"
    [[ $(uname -m) == x86_64 ]] || die "the scripts know x86-64 machines only; this is $(uname -m)"
    [[ -f $TRIXIE/complete && $(<"$TRIXIE/complete") == "$wanted" ]] && return
    mkdir -p "$PROVISION"
    local lock
    exec {lock}>"$PROVISION/lock"
    flock -n "$lock" || { say "    waiting for another run that prepares the same"; flock "$lock"; }
    if [[ ! -f $TRIXIE/complete || $(<"$TRIXIE/complete") != "$wanted" ]]; then
        make_trixie "$wanted"
    fi
    exec {lock}>&-
}

# Where Debian comes from on this machine: the address of its own apt source, so that a local mirror is used.
debian_mirror() {
    local codename
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v own="$codename" '
            $3 == "main" && $1 !~ /^cdrom:/ && ($2 == own || $2 ~ /^(stable|oldstable|testing|unstable|sid|trixie|bookworm)$/) { print $1; exit }'
}

make_trixie() {
    local wanted=$1 apt=$PROVISION/apt new=$PROVISION/trixie.new keyring mirror kernel deb start=$EPOCHREALTIME
    grep -q '^ID=debian' /etc/os-release 2>/dev/null && command -v apt-get >/dev/null ||
        die "this is no Debian system: the scripts fetch QEMU and a guest kernel through its apt"
    mirror=$(debian_mirror)
    [[ -n $mirror ]] || die "no Debian source found in this machine's apt configuration (see: apt-get indextargets)"
    for keyring in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg} ''; do
        [[ ! -e $keyring ]] || break
    done
    [[ -n $keyring ]] || die "Debian's archive keys were not found: install debian-archive-keyring"

    step "fetching Debian 13's ${TRIXIE_PACKAGES[*]} and kernel into ${PROVISION#"$PROJECT"/} (about 120 MB, once)"
    rm -rf "$apt" "$new"
    mkdir -p "$apt"/{lists,archives}/partial "$apt/etc" "$new"
    : >"$apt/status"
    printf 'deb [signed-by=%s] %s trixie main\n' "$keyring" "$mirror" >"$apt/etc/sources.list"
    # How to reach the mirror is the machine's own business (a proxy, for one): take over what it says on that.
    {
        apt-config dump | grep '^Acquire::'
        cat <<CONF
Dir::Etc "$apt/etc/";
Dir::Etc::Parts "/dev/null";
Dir::Etc::Main "/dev/null";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::State "$apt/";
Dir::State::Lists "$apt/lists/";
Dir::State::Status "$apt/status";
Dir::Cache "$apt/";
Dir::Cache::Archives "$apt/archives/";
Dir::Log "$apt/";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
Debug::NoLocking "true";
CONF
    } >"$apt/apt.conf"
    private_apt() { APT_CONFIG=$apt/apt.conf "$@"; }

    {
        private_apt apt-get -q update &&
            private_apt apt-get -q -y --download-only install "${TRIXIE_PACKAGES[@]}" &&
            kernel=$(private_apt apt-cache depends "$TRIXIE_KERNEL" | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }') &&
            [[ -n $kernel ]] &&
            (cd "$apt/archives" && private_apt apt-get -q download "$kernel")
    } >"$PROVISION/apt.log" 2>&1 </dev/null || {
        tail -n 15 "$PROVISION/apt.log" >&2
        die "fetching Debian 13's packages failed; the whole log is $PROVISION/apt.log"
    }

    say "    unpacking $(find "$apt/archives" -name '*.deb' | wc -l) packages"
    # As on every Debian of today, the old places are links into /usr.
    mkdir -p "$new"/usr/{bin,sbin,lib,lib64}
    ln -s usr/bin usr/sbin usr/lib usr/lib64 "$new/"
    for deb in "$apt"/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$new" --no-same-owner --keep-directory-symlink --exclude='./usr/share/doc/*' ||
            die "could not unpack $deb"
    done
    printf '%s' "$wanted" >"$new/complete"
    rm -rf "$TRIXIE" "$apt"
    mv "$new" "$TRIXIE"
    say "    done in $(seconds_since "$start") s"
}

# Sets COMMAND to the words that run a program of Debian 13; for a background process, whose id must be its own:
#   trixie_command qemu-system-x86_64; "${COMMAND[@]}" -version &
trixie_command() {
    local program lib=$TRIXIE/usr/lib/x86_64-linux-gnu
    for program in "$TRIXIE"/usr/{bin,sbin}/"$1" ''; do
        [[ ! -x $program || -d $program ]] || break
    done
    [[ -n $program ]] || die "$1 is not among Debian 13's programs in $TRIXIE"
    COMMAND=(
        env "QEMU_MODULE_DIR=$lib/qemu" "MKE2FS_CONFIG=$TRIXIE/etc/mke2fs.conf"
        "$TRIXIE/usr/lib64/ld-linux-x86-64.so.2" --inhibit-cache --argv0 "$1" --library-path "$lib:$lib/ceph" "$program"
    )
    case $1 in
        busybox) COMMAND=("$program") ;; # static
        qemu-system-*) COMMAND+=(-L "$TRIXIE/usr/share/qemu" -L "$TRIXIE/usr/share/seabios") ;;
    esac
}

in_trixie() {
    local COMMAND
    trixie_command "$1"
    shift
    "${COMMAND[@]}" "$@"
}

# Puts these programs of Debian 13 first on the PATH, for tests that look for them there.
trixie_on_path() {
    local programs=$PROVISION/programs name COMMAND
    mkdir -p "$programs"
    for name; do
        trixie_command "$name"
        printf '#!/bin/sh\nexec%s "$@"\n' "$(printf ' %q' "${COMMAND[@]}")" >"$programs/$name.new"
        chmod +x "$programs/$name.new"
        mv "$programs/$name.new" "$programs/$name"
    done
    export PATH=$programs:$PATH
}
