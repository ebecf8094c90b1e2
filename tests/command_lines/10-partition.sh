# A part of an image, the write cache off, the host's page cache trusted with nothing.
# listens: $DIR/part1.sock
qemu-storage-daemon \
    --blockdev driver=file,node-name=whole,filename=$DIR/disk.img,cache.direct=on,cache.no-flush=off,aio=native \
    --blockdev driver=raw,node-name=part1,file=whole,offset=1048576,size=8388608,cache.direct=on \
    --export type=vhost-user-blk,id=part1,node-name=part1,addr.type=unix,addr.path=$DIR/part1.sock,writable=on,writethrough=on,num-queues=1
