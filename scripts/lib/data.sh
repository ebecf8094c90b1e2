# Data made from a nonce: the guest writes it, the host knows its hash without having seen it.
# shellcheck shell=sh
#
# Read by the guest's shell and by the host's bash; every 64-byte line differs from all others, so that a block in a
# wrong place, an old one or a missing one changes the hash.

# make_data NONCE BYTES (a multiple of 64)
make_data() {
    ${BUSYBOX:-busybox} awk -v nonce="$1" -v lines=$(($2 / 64)) 'BEGIN {
        # The nonce is cut and padded to 32 characters, the number to 31, so that a line has 64 bytes.
        for (i = 0; i < lines; i++) printf "%-32.32s%031d\n", nonce, i
    }'
}
