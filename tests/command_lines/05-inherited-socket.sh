# A supervisor binds the socket and passes it on, so that it exists before the daemon does.
# inherits: $DIR/inherited.sock
qemu-storage-daemon \
    --blockdev node-name=disk,driver=raw,file.driver=file,file.filename=$DIR/disk.img \
    --export type=vhost-user-blk,id=disk,node-name=disk,addr.type=fd,addr.str=3,writable=on
