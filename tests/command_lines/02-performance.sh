# A benchmark's line: nested nodes, direct I/O, four queues on a polling iothread.
# listens: $DIR/vm1.sock
qemu-storage-daemon \
    --object iothread,id=iothread0,poll-max-ns=50000,poll-grow=2,poll-shrink=2 \
    --blockdev driver=raw,node-name=drive0,cache.direct=on,file.driver=file,file.filename=$DIR/disk.img,file.cache.direct=on,file.aio=io_uring \
    --export vhost-user-blk,id=drive0,node-name=drive0,addr.type=unix,addr.path=$DIR/vm1.sock,writable=on,num-queues=4,iothread=iothread0
