# Data made from a nonce: the guest writes it, the host knows its hash without having seen it.
# shellcheck shell=sh
#
# Read by the guest's shell and by the host's bash. Every sector is a line of its own, with its number and the nonce,
# so that one in a wrong place, an old one or a missing one changes the hash.

# make_data NONCE BYTES (a multiple of 512)
make_data() {
    ${BUSYBOX:-busybox} awk -v nonce="$1" -v sectors=$(($2 / 512)) 'BEGIN {
        while (length(filler) < 500) filler = filler " " nonce
        filler = substr(filler, 1, 500)
        for (i = 0; i < sectors; i++) printf "%011d%s\n", i, filler
    }'
}
