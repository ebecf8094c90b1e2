# Two disks of one guest in one process, a thread each; options and exports in no special order.
# listens: $DIR/system.sock $DIR/data.sock
qemu-storage-daemon \
    --blockdev file,node-name=system-file,filename=$DIR/disk.img \
    --object iothread,id=t0 \
    --blockdev raw,node-name=system,file=system-file \
    --export vhost-user-blk,id=system,node-name=system,addr.type=unix,addr.path=$DIR/system.sock,writable=on,iothread=t0,fixed-iothread=on \
    --object iothread,id=t1,poll-max-ns=0 \
    --blockdev raw,node-name=data,file.driver=file,file.filename=$DIR/data.img \
    --export vhost-user-blk,id=data,node-name=data,addr.type=unix,addr.path=$DIR/data.sock,writable=on,iothread=t1
