# From a boot script: in the background, its process id in a file.
# listens: $DIR/vda.sock
# pidfile: $DIR/qsd.pid
qemu-storage-daemon --daemonize --pidfile $DIR/qsd.pid \
    --blockdev driver=file,node-name=file0,filename=$DIR/disk.img,locking=on \
    --blockdev driver=raw,node-name=vda,file=file0 \
    --export type=vhost-user-blk,id=vda,node-name=vda,writable=on,addr.type=unix,addr.path=$DIR/vda.sock
