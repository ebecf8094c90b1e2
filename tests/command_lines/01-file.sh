# The shortest line there is: an image file as it is, read-only because nothing says otherwise.
# listens: $DIR/vhost-user-blk.sock
qemu-storage-daemon \
    --blockdev driver=file,node-name=disk,filename=$DIR/disk.img \
    --export type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$DIR/vhost-user-blk.sock
