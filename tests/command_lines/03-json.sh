# As a management daemon writes it: JSON throughout, storage and format as nodes of their own.
# listens: $DIR/domain-1-vda.sock
qemu-storage-daemon \
    --object '{"qom-type":"iothread","id":"iothread1","poll-max-ns":32768}' \
    --blockdev '{"driver":"file","filename":"$DIR/disk.img","node-name":"libvirt-1-storage","auto-read-only":true,"discard":"unmap","cache":{"direct":false,"no-flush":false}}' \
    --blockdev '{"node-name":"libvirt-1-format","read-only":false,"discard":"unmap","detect-zeroes":"unmap","driver":"raw","file":"libvirt-1-storage"}' \
    --export '{"type":"vhost-user-blk","id":"libvirt-1-export","node-name":"libvirt-1-format","addr":{"type":"unix","path":"$DIR/domain-1-vda.sock"},"writable":true,"num-queues":2,"iothread":"iothread1"}'
