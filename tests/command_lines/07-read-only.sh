# An installation medium that other processes have open, too.
# listens: $DIR/iso.sock
qemu-storage-daemon \
    --blockdev driver=file,node-name=iso,filename=$DIR/disk.img,read-only=on,force-share=on,locking=off \
    --export type=vhost-user-blk,id=iso,node-name=iso,addr.type=unix,addr.path=$DIR/iso.sock,writable=off
