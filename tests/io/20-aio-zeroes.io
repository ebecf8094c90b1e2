$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 1 0 128k
aio_write -z 64k 64k
aio_flush
read -P 0 64k 64k
aio_write -q 0 512
aio_flush
aio_write -z -u 0 64k
aio_flush
read -P 0 0 64k
