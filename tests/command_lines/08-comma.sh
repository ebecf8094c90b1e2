# A file name with a comma and a space, and everything a thin disk wants.
# listens: $DIR/thin.sock
qemu-storage-daemon \
    --blockdev "driver=raw,node-name=thin,discard=unmap,detect-zeroes=unmap,file.driver=file,file.discard=unmap,file.filename=$DIR/thin,,old disk.img" \
    --export type=vhost-user-blk,id=thin,node-name=thin,addr.type=unix,addr.path=$DIR/thin.sock,writable=yes
