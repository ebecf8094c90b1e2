$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
aio_write -P 1 0 64k
aio_flush
aio_read -P 1 0 64k
aio_flush
aio_write -P 2 1M 4k 4k
aio_flush
read -P 2 1M 8k
aio_read -P 3 1M 8k
aio_flush
