# Measuring the transport alone: no storage behind it, and options written with an equals sign.
# listens: $DIR/null.sock
qemu-storage-daemon \
    --blockdev=null-co,node-name=null0,size=1073741824,read-zeroes=off,latency-ns=0 \
    --export=vhost-user-blk,id=null0,node-name=null0,addr.type=unix,addr.path=$DIR/null.sock,writable=on,logical-block-size=4k
